"""Randomness is an argument: one generator for each (seed, purpose, round, client)."""

from __future__ import annotations

import zlib

import numpy as np

from shoal.errors import ConfigurationError


def generator(seed: int, purpose: str, *, round: int = 0, client: int = 0) -> np.random.Generator:
    """Returns the generator for one use of randomness, independent of every other use.

    What it yields depends on the arguments alone: not on the engine, the order of clients, the number of workers, or
    what ran before. That makes a resumed run equal to an uninterrupted one.

    Args:
        seed: The run's seed, ≥ 0.
        purpose: What the numbers are for, such as "cohort" or "fit".
        round: The round's number, 0 where there is none.
        client: The client's index, 0 where there is none.

    Raises:
        ConfigurationError: The seed is negative or no whole number.
    """
    check_seed(seed)
    key = (zlib.crc32(purpose.encode()), round, client)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def check_seed(seed: int) -> None:
    """Makes sure that a seed is one.

    Raises:
        ConfigurationError: It is negative or no whole number.
    """
    if type(seed) is not int or seed < 0:
        raise ConfigurationError(f"the seed must be a whole number ≥ 0, not {seed!r}")
