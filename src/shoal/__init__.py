"""One training definition for one GPU, many GPUs, many machines, and many sites whose data cannot move."""

from __future__ import annotations

from shoal.version import __version__

__all__ = ["__version__"]
