"""Pieces of Python that run in a process of the nursery's."""

from __future__ import annotations

import sys
import warnings


def strict():
    """Is ``python -W error -c CODE``, in a process that has its argument already."""
    warnings.simplefilter("error")
    exec(compile(sys.argv.pop(1), "<page>", "exec"), {"__name__": "__main__"})
