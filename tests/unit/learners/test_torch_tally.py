from __future__ import annotations

import math

import torch

from shoal.learners.torch_tally import Tally, mean


def test_a_batch_of_no_examples_has_no_part_in_a_mean():
    assert mean([1.0, math.nan, 4.0, math.inf], [1, 0, 2, 0]) == 3.0
    tally = Tally()
    tally.add({"loss": torch.tensor(2.0)}, 3)
    tally.add({"loss": torch.tensor(float("nan"))}, 0)
    assert tally.means() == {"loss": 2.0}


def test_the_order_of_batches_makes_no_difference():
    values, counts = [1e16, 1.0, -1e16, 3.0], [1, 3, 1, 5]
    assert mean(values, counts) == mean(values[::-1], counts[::-1]) == 1.8
