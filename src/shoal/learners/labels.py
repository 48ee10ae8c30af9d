"""Labels that have no output."""

from __future__ import annotations

import numpy as np

from shoal.errors import DataError


def check_labels(labels: np.ndarray, outputs: int, *, ignored: int | None = None) -> None:
    """Makes sure that each label has an output of the model.

    Args:
        labels: Shape [n, …].
        outputs: How many the model has.
        ignored: A label that the loss leaves out; None for none.

    Raises:
        DataError: One has not.
    """
    wrong = (labels < 0) | (labels >= outputs)
    if ignored is not None:
        wrong &= labels != ignored
    if wrong.any():
        sample = int(np.flatnonzero(wrong.reshape(len(labels), -1).any(axis=1))[0])
        raise DataError(
            f"sample {sample} has a label outside 0 to {outputs - 1}, the model's {outputs} outputs; "
            "give the model more outputs or mend the label"
        )
