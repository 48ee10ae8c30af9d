from __future__ import annotations

from itertools import product

from shoal.randomness import further_seed, generator


def test_each_use_of_randomness_has_a_seed_of_its_own():
    uses = list(product((0, 1), ("noise", "cohort"), range(4), range(4)))
    seeds = {further_seed(seed, purpose, round=round, client=client) for seed, purpose, round, client in uses}
    assert len(seeds) == len(uses)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_every_process_and_version():
    assert further_seed(7, "noise", round=3, client=1) == 5017506220774216606


def test_a_seed_says_nothing_of_the_generator_of_the_same_use():
    assert further_seed(0, "fit") != int(generator(0, "fit").bit_generator.random_raw()) >> 1
