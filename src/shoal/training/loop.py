"""The loop over a training's steps and epochs, the same on every rank."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from shoal.data import Dataset
from shoal.errors import RunInterrupted
from shoal.learners.base import CallingTraining, OngoingTraining, never
from shoal.runs import Selection, deferred
from shoal.training.callbacks import Progressed, TrainingCallback, TrainingInfo
from shoal.training.classes import class_reports
from shoal.training.definition import Training
from shoal.training.result import BestEpoch, TrainingResult
from shoal.training.storage import Progress, TrainingStorage
from shoal.types import ModelState

TRACE_AFTER = 5
"""How many steps a training that is traced makes before: the first ones look for memory and kernels."""

TRACE_STEPS = 5
"""How many are recorded then; fewer where the epoch ends between them."""


class TrainingLoop:
    """Runs a training from where its storage left it.

    Args:
        plan: What to train.
        ongoing: The model on its devices.
        examples: How many there are to train on.
        held_out: What to measure on; None for nothing.
        storage: Where progress is kept; without a folder on ranks other than 0.
        callbacks: Told of what happens; none on ranks other than 0.
        recording: The context of some steps where they are to be recorded; None on ranks other than 0, which only take
            the same steps apart from the rest.
    """

    def __init__(
        self,
        plan: Training,
        ongoing: OngoingTraining,
        examples: int,
        held_out: Dataset | None,
        *,
        storage: TrainingStorage,
        callbacks: Sequence[TrainingCallback],
        recording: AbstractContextManager[object] | None = None,
    ) -> None:
        self._plan = plan
        self._ongoing = ongoing
        self._examples = examples
        self._held_out = held_out
        self._storage = storage
        self._callbacks = callbacks
        self._calling = ongoing if isinstance(ongoing, CallingTraining) else None
        self._recording = recording
        self._alone = ongoing.ranks == 1
        self._stores = bool(ongoing.agreed(float(storage.path is not None)))
        rates = tuple(ongoing.rates())
        told = ongoing.restore(*storage.restore())
        self._progress = Progress.from_json(told["run"]) if told else Progress()
        self._history: list[dict[str, Any]] = list(told["history"]) if told else []
        self._saved_step: int | None = ongoing.step if told else None
        self._best_model = self._restored_best()
        self._selection = Selection(plan.criteria(), self._progress.best)
        self._info = self._describe(rates)
        trace_from = max(min(ongoing.step + TRACE_AFTER, ongoing.steps - TRACE_STEPS), ongoing.step)
        self._traced = range(trace_from, trace_from + TRACE_STEPS) if plan.trace else range(0)

    def run(self) -> TrainingResult:
        """Takes steps until a criterion stops them.

        Raises:
            StorageError: The run folder cannot be written.
            WorkerError: Another rank is gone.
            RunInterrupted: Ctrl-C or SIGTERM came; with one process the state is saved.
        """
        ongoing = self._ongoing
        try:
            plan, first = self._plan, self._progress.epochs + 1
            self._storage.open_trackers(plan.tensorboard, plan.trackers, first)
            for callback in self._callbacks:
                callback.on_train_start(self._info)
            while True:
                if ongoing.step == (self._progress.epochs + 1) * ongoing.steps_per_epoch:
                    self._end_epoch()
                elif self._plan.checkpoint_every and ongoing.step % self._plan.checkpoint_every == 0:
                    self._save()
                if (reason := self._stop_reason()) is not None:
                    return self._finish(reason)
                self._steps()
        except KeyboardInterrupt as interrupt:
            raise self._interrupted() from interrupt
        finally:
            for callback in self._callbacks:
                callback.close()

    def _steps(self) -> None:
        """Takes steps until the next one after which there is something to do."""
        ongoing, progress = self._ongoing, self._progress
        ends = [self._plan.log_every, ongoing.steps_per_epoch]
        if self._plan.checkpoint_every:
            ends.append(self._plan.checkpoint_every)
        until = min(ongoing.step + end - ongoing.step % end for end in ends)
        until = min([until, *(step for step in (self._traced.start, self._traced.stop) if step > ongoing.step)])
        recording = self._recording if ongoing.step == self._traced.start else None
        with recording or contextlib.nullcontext(), self._between_steps() as stop:
            started = time.perf_counter()
            means, examples = ongoing.advance(until, stop)
            seconds = time.perf_counter() - started
            progress.chunks.append((examples, means))
            progress.seconds += seconds
            progress.elapsed += seconds
        told = Progressed(
            step=ongoing.step,
            epoch=-(-ongoing.step // ongoing.steps_per_epoch),
            means=means,
            samples_per_second=examples / seconds,
        )
        for callback in self._callbacks:
            callback.on_steps(told)

    def _between_steps(self) -> AbstractContextManager[Callable[[], bool]]:
        """Holds signals back while a step is taken. Several ranks could not agree on the step to stop after."""
        return deferred(signal.SIGINT, signal.SIGTERM) if self._alone else contextlib.nullcontext(never)

    def _end_epoch(self) -> None:
        ongoing, progress, plan = self._ongoing, self._progress, self._plan
        epoch = progress.epochs + 1
        record = self._record(epoch)
        due = epoch % plan.evaluate_every == 0 or epoch == plan.epochs
        if self._held_out is not None and due:
            started = time.perf_counter()
            measured = ongoing.evaluate(self._held_out)
            progress.elapsed += time.perf_counter() - started
            record |= measured
            if self._selection.update(epoch, measured):
                progress.best, progress.best_step = self._selection.best, ongoing.step
                model = ongoing.model()  # of all ranks, and kept by one
                self._best_model = model if ongoing.rank == 0 else None
        if self._calling is not None:
            self._calling.end_epoch(record)
        # One clock decides, lest a criterion of time stops some ranks and not others.
        progress.elapsed = record["elapsed"] = ongoing.agreed(progress.elapsed)
        with self._saving():
            progress.epochs, progress.chunks, progress.seconds = epoch, [], 0.0
            self._history.append(record)
            self._storage.record(record)
            self._save()
        for callback in self._callbacks:
            callback.on_epoch_end(record)

    def _record(self, epoch: int) -> dict[str, Any]:
        """Returns what is known of an epoch before it is measured."""
        ongoing, progress = self._ongoing, self._progress
        usage = ongoing.usage()
        examples = sum(count for count, _ in progress.chunks)
        names = progress.chunks[0][1]
        means = {
            f"train_{name}": math.fsum(count * means[name] for count, means in progress.chunks) / examples
            for name in names
        }
        busy = [share for _, share in usage if not math.isnan(share)]
        return {
            "epoch": epoch,
            "step": ongoing.step,
            **means,
            **({"learning_rate": rates[0]} if (rates := ongoing.rates()) else {}),
            "examples": examples,
            "seconds": progress.seconds,
            "samples_per_second": examples / progress.seconds,
            "memory_bytes": [peak for peak, _ in usage],
            **({"utilization": sum(busy) / len(busy)} if busy else {}),
        }

    def _save(self) -> None:
        """Writes a checkpoint; every rank takes part in it."""
        ongoing = self._ongoing
        if not self._stores or ongoing.step in {self._saved_step, 0}:
            return
        tensors, meta = ongoing.state()
        with self._saving():
            meta |= {"run": self._progress.as_json()}
            self._storage.save(ongoing.step, tensors, meta, self._progress.best_step)
            self._saved_step = ongoing.step

    def _saving(self) -> AbstractContextManager[object]:
        return deferred(signal.SIGINT, signal.SIGTERM)

    def _stop_reason(self) -> str | None:
        if self._progress.chunks:  # in the middle of an epoch
            return None
        reason = self._selection.stop_reason(self._progress.epochs, self._progress.elapsed)
        if reason is None and self._calling is not None and self._calling.stopping:
            return "a callback of the learner has stopped it"
        return reason

    def _finish(self, reason: str) -> TrainingResult:
        ongoing, learner, best = self._ongoing, self._plan.learner, self._progress.best
        last = ongoing.model()
        delivered = last if self._progress.best_step is None else self._best_model
        if self._calling is not None:
            self._calling.finish()  # which may change the model
        if self._calling is not None or self._progress.best_step not in {None, ongoing.step}:
            ongoing.put(delivered if ongoing.rank == 0 else None)
        model = ongoing.model()
        confusion = None if self._held_out is None else ongoing.confusion(self._held_out)
        classes = [] if confusion is None else class_reports(confusion)
        params = learner.state_dict(model)
        chosen = None if best is None else BestEpoch(epoch=best.number, metric=best.metric, value=best.value)
        with self._saving():
            told = {"step": ongoing.step} if chosen is None else vars(chosen)
            self._storage.deliver(params, told)
            self._storage.save_classes(classes)
            self._storage.report()
        ongoing.agreed(0.0)  # a rank that ended before rank 0 has written all might be taken for one that failed
        self._storage.close_trackers("finished")
        result = TrainingResult(
            params=params,
            last_params=learner.state_dict(last),
            best=chosen,
            history=tuple(self._history),
            classes=tuple(classes),
            stopped=reason,
            run_dir=self._storage.path,
            notices=tuple(self._storage.notices),
        )
        for callback in self._callbacks:
            callback.on_train_end(result)
        return result

    def _restored_best(self) -> ModelState | None:
        """Returns the best model that the folder holds; where it cannot be read, another is chosen from here on."""
        progress, ongoing = self._progress, self._ongoing
        if progress.best_step is None:
            return None
        model = self._storage.best_model(progress.best_step) if ongoing.rank == 0 else None
        if not ongoing.agreed(float(model is not None)):
            progress.best, progress.best_step = None, None
        return model

    def _interrupted(self) -> RunInterrupted:
        path, step = self._storage.path, self._ongoing.step
        if path is None and self._stores:
            return RunInterrupted(f"stopped after step {step}; rank 0 has the run's folder")
        if path is None:
            return RunInterrupted(f"stopped after step {step}; without a run folder nothing was kept")
        if step == 0:
            return RunInterrupted("stopped before the first step")
        if self._alone:
            self._save()
            return RunInterrupted(f"stopped after step {step}; the state is saved in {path}")
        saved = self._saved_step
        kept = "no checkpoint was written yet" if saved is None else f"the last checkpoint in {path} is of step {saved}"
        return RunInterrupted(f"stopped after step {step}; {kept}")

    def _describe(self, rates: tuple[float, ...]) -> TrainingInfo:
        ongoing, batching = self._ongoing, self._ongoing.batching
        factor = batching.effective / batching.per_device if self._plan.scale_lr else 1.0
        return TrainingInfo(
            name=self._plan.name,
            epochs=self._plan.epochs,
            steps=ongoing.steps,
            first_step=ongoing.step,
            examples=self._examples,
            devices=self._plan.learner.devices,
            per_device=batching.per_device,
            device_count=batching.devices,
            accumulate=batching.accumulate,
            rates=rates,
            base_rates=tuple(rate / factor for rate in rates),
            run_dir=self._storage.path,
            notices=tuple(self._storage.notices),
        )
