"""The learner whose training is a script at each site; here is only the model that it starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from shoal.data import Dataset
from shoal.description import describe
from shoal.devices import Devices
from shoal.errors import ConfigurationError
from shoal.types import Broadcast, ModelState, Params, Update


@dataclass(frozen=True, eq=False)
class ScriptLearner:
    """The global model of a federation whose sites run a script of the user's.

    Args:
        script: The script's path.
        model: A torch module, or what makes one; or arrays by name, of numpy's or torch's.
        args: The script's arguments at all sites.
    """

    script: Path
    model: Any
    args: tuple[str, ...] = ()

    @property
    def devices(self) -> Devices:
        """The CPU, where the server's arithmetic is done."""
        return Devices(accelerator="cpu")

    def preload(self) -> None:
        """Does nothing: the sites' own processes load what they need."""

    def init(self, seed: int) -> ModelState:
        """Returns the model before training; a function that makes a module is called with torch seeded."""
        if isinstance(self.model, Mapping):
            return _by_kind(self.model)
        model, self.__dict__["_homes"] = self._made(seed)  # the slot of the cached property
        return model

    def fit(self, broadcast: Broadcast, data: Dataset, rng: np.random.Generator) -> Update:  # noqa: ARG002
        """Refuses: the script trains."""
        self._refuse()

    def evaluate(self, model: ModelState, data: Dataset) -> dict[str, float]:  # noqa: ARG002
        """Refuses: the script measures."""
        self._refuse()

    def check(self, data: Dataset) -> None:
        """Does nothing: the sites have the data."""

    def state_dict(self, model: ModelState) -> Params:
        """Returns the arrays as the script's model takes them."""
        merged = model.merged()
        return merged if isinstance(self.model, Mapping) else {name: merged[home] for name, home in self._homes.items()}

    def on(self, devices: Devices) -> Self:  # noqa: ARG002
        """Returns the same learner: the sites have devices of their own."""
        return self

    def describe(self) -> dict[str, Any]:
        """Returns what decides the numbers, as JSON."""
        digest = hashlib.sha256(self.script.read_bytes()).hexdigest()
        model = "arrays" if isinstance(self.model, Mapping) else describe(self.model)
        return {
            "name": "ScriptLearner",
            "script": self.script.name,
            "digest": digest,
            "args": list(self.args),
            "model": model,
        }

    @cached_property
    def _homes(self) -> dict[str, str]:
        """For each name in the module's state dict that under which its array is in the model."""
        return self._made(seed=0)[1]

    def _made(self, seed: int) -> tuple[ModelState, dict[str, str]]:
        """Returns the model, whose arrays are those of a module that is not kept, and their names."""
        import torch

        from shoal.learners.torch_model import ResidentModel

        resident = ResidentModel(self.model, torch.device("cpu"), seed)
        params, buffers, constants = (
            {name: tensor.detach() for name, tensor in tree.items()}
            for tree in (resident.params, resident.buffers, resident.constants)
        )
        model = ModelState(params=params, buffers=buffers, constants=constants)
        names = {id(tensor): name for name, tensor in model.merged().items()}
        return model, {name: names[id(tensor)] for name, tensor in resident.state_dict(model).items()}

    def _refuse(self) -> NoReturn:
        raise ConfigurationError(
            f"{self.script.name} trains and measures at the sites, and not in this process: run it with shoal.Job"
        )


def _by_kind(arrays: Mapping[str, Any]) -> ModelState:
    """Returns a model of named arrays: those of whole numbers never change."""
    floating = {name for name, array in arrays.items() if "float" in str(array.dtype)}
    return ModelState(
        params={name: array for name, array in arrays.items() if name in floating},
        constants={name: array for name, array in arrays.items() if name not in floating},
    )
