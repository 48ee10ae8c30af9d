"""What the workers of a distributed run do together beside the rounds: they agree, start from one state, end as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.algorithms import ServerState
from shoal.engines import DistributedEngine
from shoal.federation.preparation import Plan
from shoal.federation.result import Best, FederationResult
from shoal.federation.rounds import train_round
from shoal.federation.storage import RunState, packed, unpacked
from shoal.types import ModelState
from shoal.version import __version__


def agree(plan: Plan, team: DistributedEngine) -> None:
    """Makes sure that all workers are about to run the same experiment, each on a device of its own.

    Raises:
        ConfigurationError: They are not.
    """
    devices = {str(array.device) for array in plan.start.model.params.values()}
    facts = {"shoal": __version__, "engine": team.choice, "configuration": plan.identity}
    team.workers.agree(facts, min(devices, default="cpu"))


def send_start(team: DistributedEngine, state: ServerState) -> None:
    """Gives the other workers the state to start from; on worker 0."""
    team.workers.from_leader("start", state.round)
    team.workers.copy_leader(packed(state))


def send_end(team: DistributedEngine, run: RunState, history: Sequence[Mapping[str, Any]], reason: str) -> None:
    """Gives the other workers the end of the run; on worker 0."""
    best = dataclasses.asdict(run.best) if run.best else None
    team.finish({"stopped": reason, "best": best, "history": [dict(record) for record in history]})
    if run.best is not None:
        team.workers.copy_leader(run.model.merged())
    team.workers.part()


def follow(plan: Plan, team: DistributedEngine) -> FederationResult:
    """Trains a worker's shares for as long as worker 0 says; on the others.

    Returns:
        The result of worker 0, but for the folder.

    Raises:
        ClientError: More clients failed than the experiment allows.
        WorkerError: A worker failed or is gone.
        KeyboardInterrupt: One was interrupted.
    """
    begun = team.workers.from_leader("start")
    state = unpacked(team.workers.copy_leader(packed(plan.start)), plan.start)
    state = dataclasses.replace(state, round=begun)
    while (end := team.follow()) is None:
        state, _ = train_round(plan, state, ())
    learner, model = plan.experiment.learner, state.model
    if end["best"]:
        model = _with_arrays(model, team.workers.copy_leader(model.merged()))
    team.workers.part()
    return FederationResult(
        params=learner.state_dict(model),
        last_params=learner.state_dict(state.model),
        best=Best(**end["best"]) if end["best"] else None,
        history=tuple(end["history"]),
        stopped=end["stopped"],
        run_dir=None,
    )


def _with_arrays(model: ModelState, arrays: Mapping[str, Any]) -> ModelState:
    return ModelState(
        params={name: arrays[name] for name in model.params},
        buffers={name: arrays[name] for name in model.buffers},
        constants={name: arrays[name] for name in model.constants},
    )
