"""A user's own Lightning Trainer in a federation.

::

    import shoal.lightning

    trainer = Trainer(strategy="ddp", devices=2, max_epochs=1)      # max_epochs is a round's
    for task in shoal.lightning.tasks(trainer):
        trainer.validate(model, datamodule=data)                    # measures the global model
        trainer.fit(model, datamodule=data)                         # starts from it, and sends what comes of it
        trainer.test(ckpt_path="best", datamodule=data)
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from shoal.client.loop import TaskSource, current_task
from shoal.client.task import Task
from shoal.devices import Launched
from shoal.errors import ConfigurationError, MissingExtraError
from shoal.sites.address import Address

try:
    from lightning.pytorch import LightningModule
except ModuleNotFoundError as missing:
    raise MissingExtraError("lightning", purpose="patch a Trainer", extra="lightning") from missing

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.model_helpers import is_overridden

from shoal.learners.lightning_counts import Examples, TrainingExamples, ValidationMeans
from shoal.learners.lightning_loggers import left_open
from shoal.learners.lightning_metrics import LoggedMeans
from shoal.learners.lightning_objective import LocalObjectiveCallback
from shoal.learners.lightning_rounds import Rounds
from shoal.learners.lightning_sharded import check_divisible, undivided_after
from shoal.learners.lightning_trainer import check_kind, starts_processes

__all__ = ["patch", "tasks"]

logger = logging.getLogger(__name__)

CALLS = ("fit", "validate", "test", "predict")
"""The methods of a Trainer that are replaced."""


def patch(trainer: Trainer, *, keep_optimizer: bool = True, examples: float | None = None) -> None:
    """Lets a Trainer do the tasks of a federation; every rank of the site calls this alike, before the first task.

    Afterwards, in a task to train, ``trainer.fit(model, …)`` starts from the global model, trains for the Trainer's
    ``max_epochs`` (or ``max_steps``) and sends the result: the parameters, the means of what the module logged in
    training, and the number of examples. The terms of the local objective, such as FedProx's, are added. The first
    ``trainer.validate(model, …)`` measures the global model, and in a task to evaluate sends what the module logs, as
    means over all ranks. ``fit`` does nothing in a task to evaluate. ``test`` and ``predict`` are Lightning's own.

    Counters of epochs and steps go on from round to round. A ``ModelCheckpoint`` puts a round's checkpoints into
    ``SITE/round-N`` in its folder, and ``"best"`` and ``"last"`` are the round's; ``EarlyStopping`` begins anew. A
    ``TensorBoardLogger`` writes one file for all rounds.

    Outside of a federation the Trainer does what it would without this.

    Args:
        trainer: On as many devices as the site has, on one or with the strategy ``ddp`` or ``fsdp``.
        keep_optimizer: Whether the state of optimizers, schedulers and fp16's scaler goes on from round to round, for
            as long as the site's processes live; what ``configure_optimizers`` then asks the Trainer of its length is
            said of all rounds together. Otherwise they begin anew in each round.
        examples: The site's weight, > 0. None to count the examples in the batches of all ranks in the first epoch of
            ``fit``: the lengths of the first axes of their tensors. Those that Lightning's ``DistributedSampler``
            repeats, so that the ranks have equally many, count once.

    Raises:
        ConfigurationError: The Trainer is patched, or cannot be used at this site.
    """
    if _patched(trainer) is not None:
        raise ConfigurationError("this Trainer is patched already: call shoal.lightning.patch(trainer) once")
    if examples is not None and not examples > 0:
        raise ConfigurationError(f"examples must be > 0, the site's weight, not {examples}")
    if Address.here() is not None:
        _check(trainer, Launched.here() or Launched.alone())
    patched = Patched(trainer, keep_optimizer=keep_optimizer, examples=examples)
    for name in CALLS:
        setattr(trainer, name, getattr(patched, name))


def tasks(trainer: Trainer, *, evaluate: bool = True) -> Iterator[Task]:
    """Yields what the federation wants of this site, until it is over; every rank of the site calls it alike.

    A Trainer that is not patched is, with the defaults of :func:`patch`. A script that is started by hand gets one
    task to train.

    Args:
        trainer: The user's.
        evaluate: Whether each turn calls ``trainer.validate``, and so can measure the global model after each round.

    Raises:
        ConfigurationError: A turn did not do its task: it did not call ``fit``, or ``validate``.
        WorkerError: The server, or another rank, is gone.
    """
    if _patched(trainer) is None:
        patch(trainer)
    return _yielded(TaskSource(evaluate=evaluate))


def _yielded(source: TaskSource) -> Iterator[Task]:
    while (task := source.next_task()) is not None:
        try:
            yield task
        except GeneratorExit:  # the script has left its loop, by break or by an exception
            source.leave()
            raise
        if task.replied or task.alone:
            continue
        if task.kind == "train":
            raise ConfigurationError(f"the turn of the task to train in round {task.round} did not call trainer.fit")
        raise ConfigurationError(
            f"the turn of the task to evaluate after round {task.round} did not call trainer.validate(model, …): call "
            "it in each turn, before fit; or say shoal.lightning.tasks(trainer, evaluate=False)"
        )


class Patched:
    """What a Trainer's methods are replaced by.

    Args:
        trainer: The user's.
        keep_optimizer: Whether optimizers go on from round to round.
        examples: The site's weight; None to count.
    """

    def __init__(self, trainer: Trainer, *, keep_optimizer: bool, examples: float | None) -> None:
        self._trainer = trainer
        self._examples = Examples(examples)
        self._rounds = Rounds(trainer, keep_optimizer=keep_optimizer)
        self._said = False

    def fit(self, *args: Any, **options: Any) -> None:
        """Trains from the global model, and sends what comes of it; does nothing in a task to evaluate."""
        task, call = current_task(), self._call(Trainer.fit, args, options)
        model: Any = call.arguments.get("model")
        if task is None or (task.alone and starts_processes(self._trainer)):
            self._run(Trainer.fit, call, changes=True)
        elif task.kind == "evaluate":
            if not self._said:
                logger.debug("trainer.fit does nothing in a task to evaluate, in this round and all others")
            self._said = True
        else:
            self._check_fit(task, call)
            self._load(task, model)
            self._train(task, call, model)

    def validate(self, *args: Any, **options: Any) -> Any:
        """Measures the global model, unless ``fit`` came first or a checkpoint is given; returns the results."""
        task, call = current_task(), self._call(Trainer.validate, args, options)
        if task is None or task.replied or call.arguments.get("ckpt_path") is not None:
            return self._run(Trainer.validate, call)
        if call.arguments.get("model") is None and not task.alone:  # where Lightning would take the last fit's best
            call.arguments["model"] = self._trainer.lightning_module
        self._load(task, call.arguments.get("model"))
        if task.kind == "train":
            return self._run(Trainer.validate, call)
        means = ValidationMeans(self._examples)
        with self._calling(means):
            results = self._run(Trainer.validate, call)
        task.reply(examples=means.total, metrics=means.means)
        return results

    def test(self, *args: Any, **options: Any) -> Any:
        """Tests, as Lightning does."""
        return self._look(Trainer.test, args, options)

    def predict(self, *args: Any, **options: Any) -> Any:
        """Predicts, as Lightning does."""
        return self._look(Trainer.predict, args, options)

    def _look(self, method: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Calls ``test`` or ``predict``, also at a site that was started again and has no best checkpoint yet."""
        task, call = current_task(), self._call(method, args, options)
        checkpoint: Any = self._trainer.checkpoint_callback
        best = call.arguments.get("ckpt_path") == "best" and not getattr(checkpoint, "best_model_path", True)
        if best and task is not None and task.kind == "evaluate":
            logger.warning(
                "%s: nothing was fitted yet since this site was started, so there is no best checkpoint: %s runs with "
                "the global model of round %d",
                task.site,
                method.__name__,
                task.round,
            )
            call.arguments["ckpt_path"] = None
            if call.arguments.get("model") is None:
                call.arguments["model"] = self._trainer.lightning_module
        return self._run(method, call)

    def _train(self, task: Task, call: inspect.BoundArguments, model: Any) -> None:
        counted, means = TrainingExamples(self._examples), LoggedMeans(self._examples)
        callbacks: list[Callback] = [counted, means]
        if task.objective.proximal or task.objective.correction:
            callbacks.append(LocalObjectiveCallback(task.broadcast))
        rounds = self._rounds.next(self._trainer, rounds=task.rounds, folder=Path(task.site) / f"round-{task.round}")
        if not task.alone:
            callbacks.append(self._rounds)
        with nullcontext() if task.alone else rounds, self._calling(*callbacks):
            self._run(Trainer.fit, call, changes=True)
        if not counted.total:
            raise ConfigurationError(
                f"trainer.fit trained on no example in round {task.round}: look at its loader and limits"
            )
        arrays = _own(model).state_dict()
        likes = task.model.merged()
        task.reply(
            params={name: _of_kind(array, likes.get(name)) for name, array in arrays.items()},
            examples=counted.total,
            metrics=means.means,
        )

    def _check_fit(self, task: Task, call: inspect.BoundArguments) -> None:
        check_divisible(self._trainer, _own(call.arguments.get("model")))
        if task.alone:
            return
        if task.replied:
            raise ConfigurationError(
                f"the task to train in round {task.round} was replied to already: call trainer.fit once in each turn"
            )
        if call.arguments.get("ckpt_path") is not None:
            raise ConfigurationError(
                "trainer.fit(ckpt_path=…) would start from the checkpoint, and in a federation it starts from the "
                "global model: leave ckpt_path out, and give the job the checkpoint's model"
            )

    def _load(self, task: Task, model: Any) -> None:
        """Puts the global model into the user's; a script that runs by itself keeps its own."""
        own = _own(model)
        if not isinstance(own, LightningModule) or not task.model.merged():
            return  # Lightning says what is wrong with it
        if is_overridden("configure_model", own):  # which makes the layers, and may be called more than once
            own.trainer = self._trainer
            own.configure_model()
        task.load(own)

    def _run(self, method: Callable[..., Any], call: inspect.BoundArguments, *, changes: bool = False) -> Any:
        """Calls a method of Lightning's; the module is whole before and after."""
        model = call.arguments.get("model")
        module = _own(model) if model is not None else self._trainer.lightning_module
        loads = call.arguments.get("ckpt_path") is not None or model is None
        task = current_task()
        loggers = nullcontext() if task is None or task.alone else left_open(self._trainer)
        with undivided_after(self._trainer, module, changes=changes or loads), loggers:
            return method(*call.args, **call.kwargs)

    def _call(self, method: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> inspect.BoundArguments:
        return inspect.signature(method).bind(self._trainer, *args, **options)

    @contextmanager
    def _calling(self, *callbacks: Callback) -> Iterator[None]:
        """Has the trainer call these before the user's own, within the block."""
        trainer: Any = self._trainer
        trainer.callbacks[:0] = callbacks
        try:
            yield
        finally:
            trainer.callbacks = [callback for callback in trainer.callbacks if callback not in callbacks]


def _patched(trainer: Trainer) -> Patched | None:
    owner = getattr(trainer.__dict__.get("fit"), "__self__", None)
    return owner if isinstance(owner, Patched) else None


def _own(model: Any) -> Any:
    """Returns the module itself of one that ``torch.compile`` has wrapped."""
    return getattr(model, "_orig_mod", model)


def _of_kind(array: Any, like: Any) -> Any:
    """Returns an array in the precision that the federation has it in, whatever the trainer's is."""
    return array if like is None or array.dtype == like.dtype else array.to(like.dtype)


def _check(trainer: Trainer, place: Launched) -> None:
    """Refuses a trainer that cannot train with the processes of this site."""
    name = type(trainer.strategy).__name__
    if starts_processes(trainer):
        raise ConfigurationError(
            f"{name} starts processes, and the site's launcher has started them already: use strategy='ddp'"
        )
    check_kind(trainer, name)
    devices = trainer.num_devices * trainer.num_nodes
    if devices != place.count:
        ranks, strategy = ("rank", "") if place.count == 1 else ("ranks", ", strategy='ddp'")
        raise ConfigurationError(
            f"the site has {place.count} {ranks}, and the Trainer has {devices} devices: say devices={place.count}"
            f"{strategy} in the Trainer, or give the site {devices} devices"
        )
    endless = trainer.max_epochs in (None, -1) and trainer.max_steps == -1
    if endless and not any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigurationError("a round would never end: say Trainer(max_epochs=…), the epochs of one round")
