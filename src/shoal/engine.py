"""What an engine is: it runs a cohort and yields what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from shoal.data import Dataset, Population
from shoal.learners.base import Learner
from shoal.randomness import generator
from shoal.types import Broadcast, ModelState, StackedUpdate, Update


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ClientTask:
    """One client's part in a round."""

    client: int
    """The client's index in the population."""
    data: Dataset
    """Its training examples."""
    seed: int
    """The run's seed."""
    round: int
    """The number of the round."""

    def rng(self) -> np.random.Generator:
        """Returns the client's randomness in this round, from its beginning: a second try draws the same numbers."""
        return generator(self.seed, "fit", round=self.round, client=self.client)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientResult:
    """What came of one client's task: an update or an error."""

    client: int
    """The client's index in the population."""
    update: Update | None = None
    """What the client sent back."""
    error: Exception | None = None
    """What stopped it, with its traceback."""
    checked: bool = False
    """Whether the engine has seen to it that the update's names and shapes are the model's, and its numbers finite."""
    lasting: bool = False
    """Whether the update may be read, and again, until the engine's next round, and takes no memory of this process
    until it is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockResult:
    """What came of several clients' tasks that ran as one program.

    It is to be read before the next result is asked for, whose memory may be the same.
    """

    clients: Sequence[int]
    """The clients' indices in the population, in the order of the updates' rows."""
    updates: StackedUpdate
    """What they sent back; nothing of it need have been computed yet, if it is on a device of its own."""


Result: TypeAlias = ClientResult | BlockResult


class Engine(Protocol):
    """Runs the tasks of a cohort. Results may come in any order; the sum does not depend on it beyond rounding.

    An engine is opened, runs cohorts, and is closed. It may be opened again.
    """

    name: str
    """The engine's name in configurations and messages."""

    def open(self, learner: Learner, clients: Population) -> None:
        """Makes ready for rounds. Called before the learner touches a device.

        Args:
            learner: Trains the clients.
            clients: All of them; the tasks' data are parts of their data set.

        Raises:
            ConfigurationError: The engine cannot run here.
        """
        ...  # pragma: no cover

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Sequence[ClientTask]) -> Iterator[Result]:
        """Yields what becomes of each task, and holds no more of it than it must.

        A client's exception becomes its result. Only what stops the whole program, such as Ctrl-C, is raised.
        """
        ...  # pragma: no cover

    def close(self) -> None:
        """Lets go of processes, files and memory; without effect on an engine that is not open."""
        ...  # pragma: no cover


@runtime_checkable
class SiteEngine(Engine, Protocol):
    """An engine whose clients are sites, with data and processes of their own, for the whole run."""

    rounds: int
    """How many rounds the federation has, which the sites are told."""
    seconds: Mapping[int, float]
    """How long each site of the last round worked at its task, by client, without what it waited for."""

    def measure(self, learner: Learner, model: ModelState, round: int) -> dict[int, tuple[float, Mapping[str, float]]]:
        """Has the sites that can measure a model; returns each one's number of examples and means, by client.

        Args:
            learner: Knows the names of the model's arrays.
            model: The global model.
            round: Whose model it is.

        Raises:
            SiteError: A site failed, and the policy is to stop.
        """
        ...  # pragma: no cover

    def keep_logs(self, folder: Path) -> None:
        """Writes what is to be kept of the sites to a folder.

        Raises:
            StorageError: That cannot be written.
        """
        ...  # pragma: no cover

    def finish(self) -> None:
        """Tells the sites that the federation is over, and waits for their scripts to end by themselves."""
        ...  # pragma: no cover
