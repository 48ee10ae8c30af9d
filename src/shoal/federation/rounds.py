"""One round: a cohort is trained, its updates are summed, the method steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from shoal import trees
from shoal.algorithms import ServerState, WeightedSum
from shoal.engines import ClientResult
from shoal.errors import ClientError, NonFiniteError
from shoal.federation.callbacks import Callback
from shoal.federation.cohorts import sample_cohort
from shoal.federation.evaluation import ClientMetrics
from shoal.federation.preparation import Plan
from shoal.types import ModelState, Update

logger = logging.getLogger("shoal")


def train_round(plan: Plan, state: ServerState, callbacks: Sequence[Callback]) -> tuple[ServerState, dict[str, Any]]:
    """Returns the state after the next round, and what is known of the round as JSON.

    Raises:
        ClientError: More clients failed than the experiment allows, or all of them.
        NonFiniteError: The server's step would have made the global model NaN or infinite.
    """
    method = plan.experiment.algorithm
    broadcast = method.broadcast(state)
    number = broadcast.round
    cohort = sample_cohort(len(plan.shards.population), plan.cohort, seed=plan.experiment.seed, round=number)
    total, training = WeightedSum(state.model), ClientMetrics("train")
    failed: list[int] = []
    for result in plan.engine.run(plan.experiment.learner, broadcast, plan.shards.tasks(cohort, round=number)):
        update = _usable(result, state.model)
        if isinstance(update, Update):
            total.add(update, method.weight(update))
            training.add(update.metrics, update.weight)
        else:
            failed.append(result.client)
            _tolerate(plan, number, result.client, error=update, failures=len(failed))
        for callback in callbacks:
            callback.on_client_end(number, result.client, None if isinstance(update, Update) else update)
    if total.clients == 0:
        raise ClientError(f"all {len(cohort)} clients of round {number} failed: there is nothing to average")
    after = _checked(method.step(state, total.mean()))
    record = {
        "round": after.round,
        "clients": total.clients,
        "failed": sorted(failed),
        "examples": int(training.weight),
        **training.summary(),
        "bytes_down": len(cohort) * trees.nbytes(state.model.merged()),
        "bytes_up": total.clients * (trees.nbytes(state.model.params) + trees.nbytes(state.model.buffers)),
    }
    return after, record


def _usable(result: ClientResult, model: ModelState) -> Update | Exception:
    """Returns the result's update if the sum may take it, else what is wrong."""
    update = result.update
    if update is None:
        return result.error or ClientError("the engine returned neither an update nor an error")
    for part, tree, expected in (("delta", update.delta, model.params), ("buffers", update.buffers, model.buffers)):
        if difference := trees.mismatch(tree, expected):
            return ClientError(f"the update's {part} {difference}")
        if not trees.all_finite(tree):
            return ClientError(f"the update's {part} holds NaN or infinity: try a smaller learning rate, or clip_norm")
    if not (math.isfinite(update.weight) and update.weight > 0):
        return ClientError(f"the update's weight is {update.weight}, and must be a number > 0")
    return update


def _tolerate(plan: Plan, number: int, client: int, *, error: Exception, failures: int) -> None:
    """Warns of a failed client, or raises if it is one too many."""
    what = f"{plan.shards.population.name(client)} failed in round {number}: {type(error).__name__}: {error}"
    allowed = plan.experiment.max_failures
    if failures > allowed:
        limit = f"{allowed} failures a round are allowed" if allowed else "no failure is allowed"
        raise ClientError(f"{what} ({limit}; max_failures sets how many)") from error
    logger.warning("%s; left out of the round (%d of at most %d)", what, failures, allowed)


def _checked(state: ServerState) -> ServerState:
    if trees.all_finite(state.model.params) and trees.all_finite(state.model.buffers):
        return state
    raise NonFiniteError(
        f"the server's step of round {state.round} made the global model NaN or infinite, and was not taken: "
        "use a smaller server_lr or a smaller learning rate"
    )
