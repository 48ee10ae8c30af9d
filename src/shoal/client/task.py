"""One task of a site: what it is sent, and its reply."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shoal.client.keras_models import is_keras_model, load_arrays, put_objective
from shoal.client.link import Link
from shoal.client.state_dicts import arrays_by_name, own_part, part_as, plain_names, refuse_parts
from shoal.errors import ConfigurationError
from shoal.processes.tensors import write_tensors
from shoal.randomness import further_seed, generator
from shoal.types import Array, Broadcast, LocalObjective, ModelState, Params

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["train", "evaluate"]

Metrics = Mapping[str, Any]
"""Numbers by name; what has ``item()`` is taken as the number that it holds."""


@dataclass(kw_only=True, eq=False)
class Task:
    """What the federation wants of this site now. Every rank of the site has one; rank 0 replies."""

    kind: Kind
    """``train``: train the model and reply with what came of it. ``evaluate``: measure it, and reply with metrics."""
    round: int
    """The number of the round, counted from 1; of an ``evaluate`` task the round whose model it is."""
    rounds: int
    """How many rounds there will be, unless the federation stops early."""
    site: str
    """This site's name; ``local`` outside of a federation."""
    objective: LocalObjective = field(default_factory=LocalObjective)
    """What to minimise beside the task loss; see :meth:`apply`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The site's own settings."""
    model: ModelState
    """The global model, its arrays by role."""
    number: int = 0
    """Counts the tasks of the federation."""
    client: int = 0
    """This site's number."""
    run_seed: int = 0
    """The federation's seed, the same for all sites and rounds; see :attr:`seed`."""
    _ties: Mapping[str, str] = field(default_factory=dict)
    _link: Link | None = None
    replied: bool = False
    """Whether this rank has replied."""
    _began: float = field(default_factory=time.monotonic)

    @property
    def alone(self) -> bool:
        """Whether the script runs by itself, outside of a federation."""
        return self._link is None

    @property
    def params(self) -> dict[str, Array]:
        """The global model's arrays by the names of the model's state dict, tied weights under each of their names.

        They are this rank's own, on the CPU: torch tensors, or numpy arrays where the job's model has such.

        Raises:
            ConfigurationError: The script runs by itself, and gave no model to start from.
        """
        merged = self.model.merged()
        if not merged:
            raise ConfigurationError(
                "this script runs by itself, so no server has sent parameters: start from the model's own with "
                "shoal.client.tasks(model), or load them with task.load(model), which then does nothing"
            )
        return merged | {name: merged[home] for name, home in self._ties.items()}

    @property
    def seed(self) -> int:
        """A seed that differs from round to round and from site to site, and is the same after a resume."""
        return further_seed(self.run_seed, "site", round=self.round, client=self.client)

    def rng(self) -> np.random.Generator:
        """Returns the randomness that a learner has for this task, from its beginning, on whatever engine it trains."""
        return generator(self.run_seed, "fit", round=self.round, client=self.client)

    @property
    def broadcast(self) -> Broadcast:
        """The global model and the local objective, as learners take them."""
        return Broadcast(round=self.round, model=self.model, objective=self.objective)

    def load(self, module: Any) -> None:
        """Copies the global model into a torch module, also one in ``DistributedDataParallel`` or compiled.

        Or into a Keras model, which then has the local objective among its losses until the next task: its ``fit`` and
        ``compute_loss`` count it, and there is nothing to :meth:`apply`. In a script that runs by itself it does
        nothing.

        Args:
            module: Of torch's or Keras's.

        Raises:
            ConfigurationError: Names or shapes differ.
        """
        if not self.model.merged():
            return
        if is_keras_model(module):
            load_arrays(module, self.params)
            put_objective(module, self.objective, self.model)
            return
        own = module.state_dict()
        given = self.params
        homes = plain_names(own)
        if homes.keys() != given.keys():
            missing, unknown = sorted(given.keys() - homes.keys())[:3], sorted(homes.keys() - given.keys())[:3]
            raise ConfigurationError(
                f"the federation's model is another than this one: it has {', '.join(missing) or 'nothing'} and lacks "
                f"{', '.join(unknown) or 'nothing'}"
            )
        refuse_parts(own, "load the global model with torch.distributed.checkpoint.state_dict.set_model_state_dict")
        module.load_state_dict({own_name: given[name] for name, own_name in homes.items()})

    def apply(self, loss: Tensor, module: nn.Module) -> Tensor:
        """Adds the local objective to a loss: ``⟨correction, w⟩ + (proximal / 2)·‖w − w_global‖²``.

        Where there is nothing to add, it returns the loss itself. With ``DistributedDataParallel`` each rank adds the
        same, and the mean over the ranks is that. Where parameters are divided among the ranks (FSDP), a rank adds what
        is about its own parts. Call it after the forward pass, and scale the loss for fp16 afterwards.

        Args:
            loss: The task loss, a scalar.
            module: The module in training, with the global model's parameters.

        Raises:
            ConfigurationError: It is a Keras model, whose losses have the objective since :meth:`load`.
        """
        if is_keras_model(module):
            raise ConfigurationError(
                "a Keras model has the local objective among its losses once task.load(model) was called: "
                "leave task.apply out"
            )
        proximal, correction = self.objective.proximal, self.objective.correction
        if not proximal and not correction:
            return loss
        own = dict(module.named_parameters())
        for name, own_name in plain_names(own).items():
            if name not in self.model.params:
                continue
            parameter = own[own_name]
            part = own_part(parameter)
            if proximal:
                start = part_as(parameter, self.model.params[name])
                loss = loss + (proximal / 2) * (part - start).pow(2).sum()
            if correction:
                loss = loss + (part_as(parameter, correction[name]) * part).sum()
        return loss

    def reply(
        self,
        *,
        params: Any = None,
        delta: Params | None = None,
        examples: float | None = None,
        metrics: Metrics | None = None,
        buffers: Params | None = None,
    ) -> None:
        """Answers the task, once. Ranks other than 0 may call it too, and nothing happens.

        Args:
            params: The model after training, on any device: all of its state dict, also that of a
                ``DistributedDataParallel``; or a module, or a Keras model itself. With FSDP the whole arrays, gathered
                by all ranks; rank 0 alone needs them.
            delta: In place of ``params``: what training has changed in the trained parameters.
            examples: Number of examples trained on, or measured on, > 0, of all ranks: the site's weight in means.
            metrics: Means over them, of which rank 0's count. Those of a task to train are about the training, and
                become the round's ``train_…``; those of a task to evaluate are about the global model.
            buffers: Beside ``delta``: what it has changed in floating-point buffers.

        Raises:
            ConfigurationError: The task was replied to, or the reply is not whole; nothing was sent.
            WorkerError: The server is gone.
        """
        seconds = time.monotonic() - self._began
        if self.replied:
            raise ConfigurationError(f"{self._what()} was replied to already: one reply for each task")
        if examples is None or not examples > 0:
            raise ConfigurationError(f"a reply has examples > 0, the site's weight, not {examples}")
        trained = self.kind == "train"
        if trained and (params is None) == (delta is None):
            raise ConfigurationError("a reply to a task of kind 'train' has either params=… or delta=…")
        measured = {name: _number(name, value) for name, value in (metrics or {}).items()}
        if self._link is None:
            self._tell_terminal(float(examples), measured)
        elif self._link.rank == 0:
            tree = self._tree(params, delta, buffers) if trained else None
            kind = "" if tree is None else "params" if delta is None else "delta"
            told = {"task": self.number, "examples": float(examples), "metrics": measured, "tree": kind}
            self._send(self._link, told | {"seconds": seconds}, tree)
        self.replied = True

    def _tree(self, params: Any, delta: Params | None, buffers: Params | None) -> dict[str, Array]:
        """Returns what of the reply the server needs."""
        given = {**(delta or {}), **(buffers or {})} if params is None else arrays_by_name(params)
        refuse_parts(given, "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict")
        homes = plain_names(given)
        wanted = [*self.model.params, *(self.model.buffers if params is not None or buffers else ())]
        missing = [name for name in wanted if name not in homes]
        if missing:
            raise ConfigurationError(
                f"the reply lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}: "
                "reply with all of the model's state dict"
            )
        return {name: given[homes[name]] for name in wanted}

    @staticmethod
    def _send(link: Link, told: Mapping[str, Any], tree: dict[str, Array] | None) -> None:
        if tree is None:
            link.reply(told, None)
            return
        fd = write_tensors(tree)
        try:
            link.reply(told, fd)
        finally:
            os.close(fd)

    def _tell_terminal(self, examples: float, metrics: Mapping[str, float]) -> None:
        if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0:  # Lightning sets the second only
            told = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            sys.stdout.write(f"shoal: {self._what()} alone, {examples:g} examples{': ' if told else ''}{told}\n")

    def _what(self) -> str:
        return f"the task to {self.kind} in round {self.round}"


def _number(name: str, value: Any) -> float:
    item: Callable[[], Any] | None = getattr(value, "item", None)
    try:
        return float(item() if item is not None else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"metric {name} must be one number, not {value!r:.60}") from error
