"""Known data sets, one a file; reached as functions of :mod:`shoal.data`."""
