"""Precision and recall, class by class."""

from __future__ import annotations

import numpy as np

from shoal.training.result import ClassReport


def class_reports(confusion: np.ndarray) -> list[ClassReport]:
    """Returns how each class was told from the others.

    Args:
        confusion: How many examples of each class were taken for which, int64 [classes, classes].
    """
    right, there, taken = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return [
        ClassReport(
            label=label,
            precision=_share(right[label], taken[label]),
            recall=_share(right[label], there[label]),
            f1=_share(2 * right[label], there[label] + taken[label]),
            examples=int(there[label]),
        )
        for label in range(len(confusion))
    ]


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else 0.0
