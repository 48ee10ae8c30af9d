"""The learner whose training is a script at each site; here is only the model that it starts from."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from shoal.data import Dataset
from shoal.description import describe
from shoal.devices import Devices
from shoal.errors import ConfigurationError
from shoal.learners.base import Learner
from shoal.types import Broadcast, ModelState, Params, Update


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstModel(ModelState):
    """A model as it was before training, in another process."""

    ties: Mapping[str, str] = field(default_factory=dict)
    """Further names that its state dict has, each with the one under which the array is in the model."""


@dataclass(frozen=True, eq=False)
class ScriptLearner:
    """The global model of a federation whose sites run a script of the user's.

    Args:
        script: The script's path.
        model: A torch module or a Keras model, or what makes one; or arrays by name, of numpy's or torch's; or a model
            that was saved.
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
        """Returns the model before training; a function that makes one is called with its framework seeded."""
        model, self.__dict__["_ties"] = self._made(seed)  # the slot of the cached property
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
        return merged | {name: merged[home] for name, home in self._ties.items()}

    def on(self, devices: Devices) -> Self:  # noqa: ARG002
        """Refuses: the sites have devices of their own."""
        raise ConfigurationError(
            f"the devices of {self.script.name} are those of its sites: "
            "say shoal.Site(…, devices=…), or accelerator=… of the job"
        )

    def describe(self) -> dict[str, Any]:
        """Returns what decides the numbers, as JSON."""
        digest = hashlib.sha256(self.script.read_bytes()).hexdigest()
        arrays = isinstance(self.model, Mapping | ModelState)  # of which the run's identity has names and shapes
        model = "arrays" if arrays else describe(self.model)
        return {
            "name": "ScriptLearner",
            "script": self.script.name,
            "digest": digest,
            "args": list(self.args),
            "model": model,
        }

    @cached_property
    def _ties(self) -> Mapping[str, str]:
        """The further names that the model's state dict has, each with the one of the same array in the model."""
        return self._made(seed=0)[1]

    def _made(self, seed: int) -> tuple[ModelState, Mapping[str, str]]:
        """Returns the model, whose arrays are those of a module that is not kept, and its further names."""
        if isinstance(self.model, FirstModel):
            return self.model, self.model.ties
        if isinstance(self.model, Mapping):
            return _by_kind(self.model), {}
        if (made := _made_by_keras(self.model, seed)) is not None:
            return made, {}
        import torch

        from shoal.learners.torch_model import ResidentModel

        resident = ResidentModel(self.model, torch.device("cpu"), seed)
        params, buffers, constants = (
            {name: tensor.detach() for name, tensor in tree.items()}
            for tree in (resident.params, resident.buffers, resident.constants)
        )
        model = ModelState(params=params, buffers=buffers, constants=constants)
        return model, ties_of(model, resident.state_dict(model))

    def ties(self, model: ModelState) -> dict[str, str]:
        """Returns the further names that the model's state dict has, each with the one of the same array."""
        return ties_of(model, self.state_dict(model))

    def _refuse(self) -> NoReturn:
        raise ConfigurationError(
            f"{self.script.name} trains and measures at the sites, and not in this process: run it with shoal.Job"
        )


def ties_of(model: ModelState, state_dict: Params) -> dict[str, str]:
    """Returns the names that a state dict has beside the model's own, each with the one of the same array."""
    merged = model.merged()
    homes = {id(array): name for name, array in merged.items()}
    return {name: homes[id(array)] for name, array in state_dict.items() if name not in merged}


def ties_at_server(learner: Learner, model: ModelState) -> dict[str, str]:
    """Returns the ties of a learner's model, and has it let go of the module that told them.

    Where sites train, the server may never need that again: it would be a second model in its memory.
    """
    ties = ties_of(model, learner.state_dict(model))
    release = getattr(learner, "release", None)
    if release is not None:
        release()
    return ties


def _made_by_keras(model: Any, seed: int) -> ModelState | None:
    """Returns a Keras model before training; None where it is none, which it can only be if Keras was imported."""
    keras = sys.modules.get("keras")
    if keras is None or keras.config.backend() != "tensorflow":
        return None
    from shoal.learners.keras_model import first_model

    return first_model(model, seed)


def _by_kind(arrays: Mapping[str, Any]) -> ModelState:
    """Returns a model of named arrays: those of whole numbers never change."""
    floating = {name for name, array in arrays.items() if "float" in str(array.dtype)}
    return ModelState(
        params={name: array for name, array in arrays.items() if name in floating},
        constants={name: array for name, array in arrays.items() if name not in floating},
    )
