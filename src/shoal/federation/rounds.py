"""One round: a cohort is trained, its updates are summed, the method steps."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from shoal import trees
from shoal.algorithms import ServerState
from shoal.data import Population
from shoal.engines import CohortSum, Outcome, SiteEngine, one_line
from shoal.errors import ClientError, NonFiniteError
from shoal.federation.callbacks import Callback
from shoal.federation.cohorts import sample_cohort
from shoal.federation.evaluation import ClientMetrics
from shoal.federation.preparation import Plan
from shoal.processes.memory import most_resident

logger = logging.getLogger("shoal")

MAX_SITES = 100
"""Of as many named clients a round's record holds each one's own metrics."""


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
    summed = CohortSum(state.model, method.weight)
    ends = _Ends(plan, number, callbacks)
    for result in plan.engine.run(plan.experiment.learner, broadcast, plan.shards.tasks(cohort, round=number)):
        ends.note(summed.add(result))
    ends.note(summed.settle())
    if plan.team is not None:
        ends.note(plan.team.combine(summed, cohort))
    if summed.total.clients == 0:
        raise ClientError(f"all {len(cohort)} clients of round {number} failed: there is nothing to average")
    after = _checked(method.step(state, summed.total.mean()))
    record = {
        "round": after.round,
        "clients": summed.total.clients,
        "failed": sorted(summed.failures),
        "examples": int(sum(summed.examples.values())),
        **_training(summed).summary(),
        **_sites(summed, plan.shards.population),
        **(_costs(plan, plan.engine) if isinstance(plan.engine, SiteEngine) else {}),
        "bytes_down": len(cohort) * trees.nbytes(state.model.merged()),
        "bytes_up": summed.total.clients * (trees.nbytes(state.model.params) + trees.nbytes(state.model.buffers)),
    }
    return after, record


class _Ends:
    """Tells the callbacks of each client's end, and stops a round in which too many failed.

    Args:
        plan: Says how many may fail.
        number: The round.
        callbacks: Told of each client.
    """

    def __init__(self, plan: Plan, number: int, callbacks: Sequence[Callback]) -> None:
        self._plan = plan
        self._number = number
        self._callbacks = callbacks
        self._failures = 0

    def note(self, outcomes: Iterable[Outcome]) -> None:
        """Takes what became of some clients."""
        for client, error in outcomes:
            if error is not None:
                self._failures += 1
                self._tolerate(client, error)
            for callback in self._callbacks:
                callback.on_client_end(self._number, client, error)

    def _tolerate(self, client: int, error: Exception) -> None:
        """Warns of a failed client, or raises if it is one too many."""
        name = self._plan.shards.population.name(client)
        what = f"{name} failed in round {self._number}: {one_line(error).removeprefix(f'{name}: ')}"
        allowed = self._plan.experiment.max_failures
        if self._failures > allowed:
            limit = f"{allowed} failures a round are allowed" if allowed else "no failure is allowed"
            raise ClientError(f"{what} ({limit}; max_failures sets how many)") from error
        if self._plan.leads:
            logger.warning("%s; left out of the round (%d of at most %d)", what, self._failures, allowed)


def _training(summed: CohortSum) -> ClientMetrics:
    """Returns the clients' metrics, in the clients' order whatever the order of the results was."""
    metrics = ClientMetrics("train")
    for name, column in summed.metrics.items():
        clients = sorted(column)
        metrics.extend(name, [column[client] for client in clients], [summed.examples[client] for client in clients])
    return metrics


def _sites(summed: CohortSum, population: Population) -> dict[str, Any]:
    """Returns the metrics of each client that has a name; nothing where there are too many to be told apart."""
    if not population.named or len(population) > MAX_SITES:
        return {}
    found: dict[str, dict[str, float]] = {population.name(client): {} for client in sorted(summed.examples)}
    for name, column in summed.metrics.items():
        for client, value in column.items():
            found[population.name(client)][name] = float(value)
    return {"sites": found}


def _costs(plan: Plan, engine: SiteEngine) -> dict[str, Any]:
    """Returns what a round of sites took: each one's own time, and the most memory that this process had for them."""
    name = plan.shards.population.name
    return {
        "site_seconds": {name(client): seconds for client, seconds in sorted(engine.seconds.items())},
        "memory_bytes": max(most_resident() - plan.memory_before, 0),
    }


def _checked(state: ServerState) -> ServerState:
    if trees.all_finite(state.model.params) and trees.all_finite(state.model.buffers):
        return state
    raise NonFiniteError(
        f"the server's step of round {state.round} made the global model NaN or infinite, and was not taken: "
        "use a smaller server_lr or a smaller learning rate"
    )
