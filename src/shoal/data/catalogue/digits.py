"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np

from shoal.data.dataset import ArrayDataset
from shoal.errors import ConfigurationError, MissingExtraError
from shoal.randomness import generator


def digits(*, test_fraction: float = 0.2, seed: int = 0) -> tuple[ArrayDataset, ArrayDataset]:
    """Returns scikit-learn's digits as training and test data: 1,797 images in 10 classes.

    Args:
        test_fraction: The test data's share of each class, in (0, 1).
        seed: Decides which images those are.

    Returns:
        Inputs float32 [n, 1, 8, 8] in 0 to 1, targets int64 [n].

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    if not 0 < test_fraction < 1:
        raise ConfigurationError(f"test_fraction must be in (0, 1), not {test_fraction}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", purpose="load the digits", extra="demo") from error
    bunch = load_digits()
    inputs = (bunch.images[:, None] / 16).astype(np.float32)
    targets = bunch.target.astype(np.int64)
    rng = generator(seed, "digits")
    is_test = np.zeros(len(targets), dtype=bool)
    for label in range(10):
        samples = rng.permutation(np.flatnonzero(targets == label))
        is_test[samples[: round(len(samples) * test_fraction)]] = True
    train, test = (ArrayDataset(inputs[part], targets[part], classes=10, name="digits") for part in (~is_test, is_test))
    return train, test
