"""The loop over rounds: a fold of the method's step over the cohorts' aggregates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from shoal.algorithms import ServerState
from shoal.errors import RunInterrupted, StorageError
from shoal.federation.callbacks import Callback, RunInfo
from shoal.federation.interrupts import deferred_interrupts
from shoal.federation.preparation import Plan
from shoal.federation.result import Best, FederationResult
from shoal.federation.rounds import train_round
from shoal.federation.storage import RunState, RunStorage
from shoal.federation.together import send_end, send_start
from shoal.runs import Choice, Selection


class FederationLoop:
    """Runs a prepared experiment from where its storage left it.

    Args:
        plan: The experiment, checked, with everything made that a round needs.
        storage: Where progress is kept.
        callbacks: Told of what happens.
    """

    def __init__(self, plan: Plan, storage: RunStorage, callbacks: Sequence[Callback]) -> None:
        self._plan = plan
        self._storage = storage
        self._callbacks = callbacks
        self._run, self._history = storage.restore(plan.first.pop())
        best = self._run.best
        chosen = None if best is None else Choice(number=best.round, metric=best.metric, value=best.value)
        self._selection = Selection(plan.experiment.criteria(), chosen)
        self._asked_to_stop: str | None = None

    def run(self) -> FederationResult:
        """Runs rounds until a criterion stops them.

        Raises:
            ClientError: More clients of a round failed than the experiment allows.
            NonFiniteError: The server's step would have made the global model NaN or infinite.
            StorageError: The run folder cannot be written.
            RunInterrupted: Ctrl-C or SIGTERM came; the state is saved.
        """
        try:
            self._announce()
            if self._plan.team is not None:
                send_start(self._plan.team, self._run.state)
            while (reason := self._stop_reason(self._run.state.round, self._run.elapsed)) is None:
                self._round()
            return self._finish(reason)
        except KeyboardInterrupt as interrupt:
            raise self._interrupted() from interrupt
        except StorageError:
            raise
        except Exception:
            with deferred_interrupts():
                self._storage.save(self._run)  # rounds since the last checkpoint need not be run again
            raise
        finally:
            for callback in self._callbacks:
                callback.close()

    def _announce(self) -> None:
        plan, first = self._plan, self._run.state.round + 1
        self._storage.open_trackers(plan.experiment.tensorboard, plan.experiment.trackers, first)
        info = RunInfo(
            name=plan.experiment.name,
            rounds=plan.experiment.rounds,
            first_round=first,
            population=len(plan.shards.population),
            cohort=plan.cohort,
            run_dir=self._storage.path,
            notices=(plan.engine_choice, *self._storage.notices),
        )
        for callback in self._callbacks:
            callback.on_run_start(info)

    def _round(self) -> None:
        before = self._run
        started = time.perf_counter()
        state, record = train_round(self._plan, before.state, self._callbacks)
        seconds = time.perf_counter() - started
        elapsed = before.elapsed + seconds
        record |= {"seconds": seconds, "clients_per_second": record["clients"] / seconds, "elapsed": elapsed}
        due = state.round % self._plan.experiment.evaluate_every == 0
        last = self._stop_reason(state.round, elapsed) is not None
        measured = self._measure(state) if due or last else {}
        self._asked_to_stop = self._tell(record | measured)
        if self._asked_to_stop and not measured:
            measured = self._measure(state)
        self._commit(state, record | measured, elapsed, measured)

    def _measure(self, state: ServerState) -> dict[str, float]:
        evaluator = self._plan.evaluator
        return evaluator.measure(state.model, state.round) if evaluator else {}

    def _commit(self, state: ServerState, record: dict[str, Any], elapsed: float, measured: dict[str, float]) -> None:
        """Takes a round into the run's progress; what is written for it belongs together."""
        with deferred_interrupts():
            improved = bool(measured) and self._selection.update(state.round, measured)
            best, best_model = self._run.best, self._run.best_model
            if improved and (choice := self._selection.best) is not None:
                best = Best(round=choice.number, metric=choice.metric, value=choice.value)
                best_model = state.model
            self._run = RunState(state=state, elapsed=elapsed, best=best, best_model=best_model)
            self._history.append(record)
            self._storage.record(record)
            if improved or state.round % self._plan.experiment.checkpoint_every == 0:
                self._storage.save(self._run)

    def _tell(self, record: dict[str, Any]) -> str | None:
        reasons = [callback.on_round_end(record) for callback in self._callbacks]
        return next((reason for reason in reasons if reason), None)

    def _stop_reason(self, rounds_done: int, elapsed: float) -> str | None:
        return self._asked_to_stop or self._selection.stop_reason(rounds_done, elapsed)

    def _finish(self, reason: str) -> FederationResult:
        run, learner = self._run, self._plan.experiment.learner
        with deferred_interrupts():
            self._storage.save(run)
            params = learner.state_dict(run.model)
            told = dataclasses.asdict(run.best) if run.best else {"round": run.state.round}
            self._storage.deliver(params, told)
            self._storage.report()
        if self._plan.team is not None:
            send_end(self._plan.team, run, self._history, reason)
        self._storage.close_trackers("finished")
        result = FederationResult(
            params=params,
            last_params=learner.state_dict(run.state.model),
            best=run.best,
            history=tuple(self._history),
            stopped=reason,
            run_dir=self._storage.path,
            notices=tuple(self._storage.notices),
        )
        for callback in self._callbacks:
            callback.on_run_end(result)
        return result

    def _interrupted(self) -> RunInterrupted:
        done, path = self._run.state.round, self._storage.path
        if path is None:
            return RunInterrupted(f"stopped after round {done}; without a run folder nothing was kept")
        with deferred_interrupts():
            self._storage.save(self._run)
        return RunInterrupted(f"stopped after round {done}; the state is saved in {path}")
