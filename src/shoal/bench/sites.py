"""``shoal bench sites``: what a round of sites costs beyond their training, by engine and size of the model."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal.bench.deployed_sites import DeployedSites
from shoal.bench.local_sites import LocalSites
from shoal.bench.site_case import SiteCase, SiteRun
from shoal.errors import ConfigurationError, EngineError, unknown_name
from shoal.runs import sigterm_raised

ENGINES = ("local", "flower", "nvflare")
"""``local`` is shoal's own engine of sites on this machine."""

TINY = 0.01
"""Megabytes of the model whose run says what memory does not depend on the model."""


class Runs(Protocol):
    """Sites that are there for several runs."""

    def run(self, case: SiteCase, folder: Path) -> SiteRun:
        """Runs a federation, and returns what was noted of it.

        Args:
            case: Which.
            folder: A new one, for all of the run's files.

        Raises:
            EngineError: It did not end well.
        """
        ...  # pragma: no cover


Opened = Callable[[str, Sequence[str], int, Path], AbstractContextManager[Runs]]
"""Makes an engine's sites of so many ranks each, by their names, in a folder."""


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """What was measured of one engine and size; times are medians over rounds, without the first one."""

    engine: str
    """Which engine."""
    own: bool
    """Whether the engine's own FedAvg ran, and not shoal's federation."""
    size_mb: float
    """Size of the model."""
    sites: int
    """How many sites."""
    ranks: int
    """Of each."""
    rounds: int
    """Rounds that are in the medians."""
    seconds: float
    """A round."""
    training_seconds: float
    """What its slowest site took of it."""
    overhead_seconds: float
    """The rest."""
    bytes_moved: int
    """To the sites and back, in a round."""
    memory_bytes: int
    """The most memory of the server's processes, beyond what they take with a model of next to nothing."""
    memory_models: float
    """The same as a multiple of the model."""


def measure_sites(
    *,
    sizes: Sequence[float] = (1, 10, 100),
    sites: int = 2,
    ranks: int = 1,
    rounds: int = 5,
    engines: Sequence[str] = ("local",),
    baseline: bool = False,
    tell: Callable[[str], object] = lambda _: None,
    opened: Opened | None = None,
) -> list[SiteCost]:
    """Measures rounds of federated averaging whose sites take one small step each.

    Args:
        sizes: Of the model, in megabytes of float32.
        sites: How many, all on this machine.
        ranks: Processes of each.
        rounds: Rounds that are timed, after one that is not.
        engines: Some of :data:`ENGINES`.
        baseline: Whether to run the engine's own FedAvg over arrays of the same size too, in turn.
        tell: Is told what is measured now.
        opened: Makes an engine's sites; None for real ones.

    Raises:
        ConfigurationError: A number or a name cannot be.
        MissingExtraError: An engine is not installed.
        EngineError: A run did not end well.
    """
    _check(sizes, sites, ranks, rounds, engines)
    found = []
    names = [f"site-{number}" for number in range(1, sites + 1)]
    for engine in engines:
        both = (False, True) if baseline and engine != "local" else (False,)
        with sigterm_raised(), tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
            tell(f"{engine}: {sites} sites start")
            with (opened or _open)(engine, names, ranks, Path(folder)) as runs:
                least: dict[bool, int] = {}
                for size in [TINY, *sorted(sizes)]:
                    for own in both:
                        tell(f"{engine}: {size:g} MB{', its own FedAvg' if own else ''}")
                        case = SiteCase(engine=engine, own=own, size_mb=size, sites=sites, ranks=ranks, rounds=rounds)
                        run = runs.run(case, Path(folder) / f"{'own' if own else 'shoal'}-{size:g}")
                        least.setdefault(own, run.memory_bytes)
                        if size != TINY:
                            found.append(cost_of(case, run, least[own]))
    return found


def cost_of(case: SiteCase, run: SiteRun, least: int) -> SiteCost:
    """Returns what a run says of its rounds.

    Args:
        case: What was run.
        run: What was noted of it.
        least: Bytes that the server took with the smallest model.

    Raises:
        EngineError: Rounds are missing.
    """
    records = run.records[1:]
    if not records:
        raise EngineError(f"the run of {case.engine} with {case.size_mb:g} MB has no rounds after its first")
    training = [max(record["site_seconds"].values(), default=0.0) for record in records]
    seconds = [record["seconds"] for record in records]
    grown = max(run.memory_bytes - least, 0)
    return SiteCost(
        **{name: getattr(case, name) for name in ("engine", "own", "size_mb", "sites", "ranks")},
        rounds=len(records),
        seconds=statistics.median(seconds),
        training_seconds=statistics.median(training),
        overhead_seconds=statistics.median(all_ - own for all_, own in zip(seconds, training, strict=True)),
        bytes_moved=round(statistics.median(record["bytes_down"] + record["bytes_up"] for record in records)),
        memory_bytes=grown,
        memory_models=grown / (case.size_mb * 1e6),
    )


def as_json(costs: Sequence[SiteCost]) -> list[Mapping[str, Any]]:
    """Returns the costs as JSON."""
    return [dataclasses.asdict(cost) for cost in costs]


def _open(engine: str, names: Sequence[str], ranks: int, folder: Path) -> AbstractContextManager[Runs]:
    if engine == "local":
        return LocalSites()
    return DeployedSites(engine, names, ranks, folder / "deployment")


def _check(sizes: Sequence[float], sites: int, ranks: int, rounds: int, engines: Sequence[str]) -> None:
    for name, value in (("sites", sites), ("ranks", ranks), ("rounds", rounds)):
        if value < 1:
            raise ConfigurationError(f"{name} must be ≥ 1, not {value}")
    if not sizes or not min(sizes) > TINY:
        raise ConfigurationError(f"sizes are megabytes, more than {TINY:g}, as in 1,10,100")
    for engine in engines:
        if engine not in ENGINES:
            raise unknown_name("engine with sites", engine, ENGINES)
