"""Updates that wait on disk for a round's sum, so that no two models of sites are in memory at once."""

from __future__ import annotations

import os
import tempfile

from shoal.deploy.parcel import Parcel, write_parcel_to
from shoal.processes.tensors import TensorFile


def spooled(parcel: Parcel) -> TensorFile:
    """Returns the arrays of a parcel as a file without a name on the disk of temporary files.

    Raises:
        OSError: The disk is full.
    """
    with tempfile.TemporaryFile(prefix="shoal-") as file:
        write_parcel_to(parcel, file)
        file.flush()
        return TensorFile(os.dup(file.fileno()))
