from __future__ import annotations

import gc
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shoal.data import ArrayDataset
from shoal.learners.script import ties_at_server
from shoal.learners.torch import TorchLearner


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Linear(3, 3)
        self.outer.weight = self.inner.weight

    def forward(self, inputs):
        return self.outer(self.inner(inputs))


def test_a_server_of_sites_keeps_no_module():
    learner = TorchLearner(Tied, loss=F.cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), batch_size=2)
    model = learner.init(0)
    expected = {name: array.clone() for name, array in learner.state_dict(model).items()}
    assert ties_at_server(learner, model) == {"outer.weight": "inner.weight"}
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is Tied]
    data = ArrayDataset(np.ones((4, 3), np.float32), np.array([0, 1, 2, 0]), name="ones")
    assert learner.evaluate(model, data)["loss"] > 0
    found = learner.state_dict(model)
    assert all(torch.equal(found[name], array) for name, array in expected.items())
