"""``shoal bench simulate``: how fast an engine runs rounds, against a plain loop in the same process."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from shoal.bench.baseline import LEARNING_RATE, SPAWNED, PlainLoop, SpawnedClients
from shoal.bench.models import MODELS, BenchModel, random_samples
from shoal.data import ArrayDataset, Population
from shoal.devices import Devices, Launched
from shoal.engines import DistributedEngine, Engine, ProcessEngine, VectorizedEngine
from shoal.errors import ConfigurationError, unknown_name
from shoal.federation import Experiment
from shoal.federation.preparation import Plan, prepare
from shoal.federation.rounds import train_round
from shoal.learners.torch import TorchLearner
from shoal.learners.torch_devices import computing

BASELINES = ("loop", "spawn")
"""What an engine can be measured against."""

WARM_UP = 2
"""Rounds before the clock starts, once an engine has found how it runs best."""

MOST_SEARCHING = 60
"""Rounds that the search for that may take."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured; times are medians over rounds."""

    engine: str
    """Which engine ran, on each worker."""
    workers: int
    """How many processes shared each cohort."""
    model: str
    """The model's name."""
    seconds_per_round: float
    """Time of a round: sampling, training, summing and the server's step."""
    clients_per_second: float
    """Clients in that time."""
    samples_per_second: float
    """Samples in that time."""
    peak_host_bytes: int
    """The most memory that each process had at any time, data and libraries included; of all workers together."""
    peak_device_bytes: int
    """The most memory that torch had allocated on the workers' CUDA devices; 0 on a CPU."""
    baseline_ratio: float | None
    """The baseline's time for the same work, as a multiple; None where none was run."""
    block_size: int | None
    """The block size that was found; None for engines without."""
    variant: str | None
    """How its blocks were found to run best; None for engines without."""
    threads: int
    """CPU threads that one operation may use."""


def simulate(
    *,
    model: str,
    population: int = 1000,
    cohort: int = 100,
    samples: int = 50,
    batch_size: int = 10,
    rounds: int = 8,
    engine: str | Engine = "auto",
    devices: Devices | None = None,
    baseline: str | None = None,
) -> Measurement | None:
    """Measures rounds of federated averaging with SGD, one local epoch, on random data in memory.

    Args:
        model: A name from :data:`~shoal.bench.MODELS`.
        population: Number of clients.
        cohort: Clients in a round.
        samples: Samples of each client.
        batch_size: Samples in a batch.
        rounds: Number of rounds that are timed.
        engine: Where the cohort runs.
        devices: Where the model lives; None for CUDA if there is one.
        baseline: What to run the same rounds in too, one after the other in turn: ``"loop"``, a plain loop over one
            resident model, with as many threads as all workers of this machine together; ``"spawn"``, a process for
            each client; None for nothing.

    Returns:
        What was measured; None on workers other than the first.

    Raises:
        ConfigurationError: A number is not positive, or a name is unknown.
    """
    if model not in MODELS:
        raise unknown_name("model", model, MODELS)
    if baseline is not None and baseline not in BASELINES:
        raise unknown_name("baseline", baseline, BASELINES)
    _require_positive(population=population, cohort=cohort, samples=samples, batch_size=batch_size, rounds=rounds)
    data = random_samples(MODELS[model], population * samples)
    table = np.arange(population * samples).reshape(population, samples) % len(data)
    clients = Population(data, table.reshape(-1), np.arange(population + 1) * samples)
    learner = _learner(MODELS[model], batch_size, devices or Devices())
    plan = prepare(Experiment(learner=learner, clients=clients, rounds=rounds, cohort=cohort, engine=engine))
    with contextlib.closing(plan.engine), computing(learner.device, learner.devices.threads):
        if plan.team is not None and not plan.team.workers.leads:
            _follow(plan, plan.team)
            return None
        other = None
        if baseline is not None:
            other = _baseline(baseline, model=model, learner=learner, data=data, clients=table, cohort=cohort)
        ours, theirs = _timed(plan, other, rounds)
        peaks = _all_peaks(plan.team)
        local = plan.engine if plan.team is None else plan.team.local
    seconds = statistics.median(ours)
    return Measurement(
        engine=local.name,
        workers=len(peaks),
        model=model,
        seconds_per_round=seconds,
        clients_per_second=plan.cohort / seconds,
        samples_per_second=plan.cohort * samples / seconds,
        peak_host_bytes=sum(host for host, _ in peaks),
        peak_device_bytes=sum(device for _, device in peaks),
        baseline_ratio=statistics.median(theirs) / seconds if theirs else None,
        block_size=local.found_block_size if isinstance(local, VectorizedEngine) else None,
        variant=local.found_variant if isinstance(local, VectorizedEngine) else None,
        threads=_threads(local, learner.devices),
    )


def _threads(engine: Engine, devices: Devices) -> int:
    if isinstance(engine, ProcessEngine):
        return engine.child_threads(devices)
    return devices.threads or torch.get_num_threads()


def _require_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigurationError(f"{name.replace('_', '-')} must be at least 1, not {value}")


def _learner(model: BenchModel, batch_size: int, devices: Devices) -> TorchLearner:
    return TorchLearner(
        model.make,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE),
        batch_size=batch_size,
        devices=devices,
    )


def _baseline(
    name: str, *, model: str, learner: TorchLearner, data: ArrayDataset, clients: np.ndarray, cohort: int
) -> Callable[[], float]:
    """Returns a round of the same work on the same device, written by hand, which returns the seconds it takes."""
    batch_size, rng = learner.batch_size or 1, np.random.default_rng(1)
    if name == "spawn":
        spawned = SpawnedClients(model, str(learner.device), data, clients, batch_size)
        share = cohort / min(SPAWNED, cohort)
        return lambda: share * _clock(lambda: spawned.round(rng.choice(len(clients), cohort, replace=False)))
    inputs, targets = (torch.from_numpy(array).to(learner.device) for array in (data.inputs, data.targets()))
    table = torch.from_numpy(clients).to(learner.device)
    loop = PlainLoop(learner.model().to(learner.device), inputs, targets, table, batch_size)
    beside = (Launched.here() or Launched.alone()).local_count
    threads = (learner.devices.threads or torch.get_num_threads()) * beside

    def round() -> float:
        with computing(learner.device, threads):
            return _clock(lambda: loop.round(rng.choice(len(clients), cohort, replace=False)))

    return round


def _timed(plan: Plan, other: Callable[[], float] | None, rounds: int) -> tuple[Sequence[float], Sequence[float]]:
    """Returns the seconds of each timed round, ours and the baseline's."""
    state = plan.start

    def ours() -> None:
        nonlocal state
        state, _ = train_round(plan, state, ())

    _warm_up(plan.engine if plan.team is None else plan.team.local, ours)
    if other is not None:
        other()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        times[0].append(_clock(ours))
        if other is not None:
            times[1].append(other())
    return times


def _follow(plan: Plan, team: DistributedEngine) -> None:
    """Trains a worker's shares for as long as worker 0 measures; on the others."""
    state = plan.start
    while team.follow() is None:
        state, _ = train_round(plan, state, ())
    team.workers.gather("peak", _peak())


def _all_peaks(team: DistributedEngine | None) -> list[tuple[int, int]]:
    """Returns every worker's largest memory so far, and ends the others' rounds."""
    if team is None:
        return [_peak()]
    team.finish("measured")
    return [_peak(), *team.workers.gather("peak", None)]


def _peak() -> tuple[int, int]:
    """Returns the most memory that this process has had, in bytes, and that torch has had on the CUDA device."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device


def _warm_up(engine: Any, round: Callable[[], None]) -> None:
    for _ in range(WARM_UP):
        round()
    searched = WARM_UP
    while isinstance(engine, VectorizedEngine) and not engine.settled and searched < MOST_SEARCHING:
        round()
        searched += 1


def _clock(action: Callable[[], None]) -> float:
    _synchronize()
    started = time.perf_counter()
    action()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
