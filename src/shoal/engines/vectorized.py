"""The cohort as one program: blocks of clients, stacked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from shoal.data import Dataset, Population
from shoal.engine import BlockResult, ClientResult, ClientTask, Result
from shoal.engines.blocks import BlockSearch, by_work, next_block
from shoal.engines.sequential import attempt
from shoal.errors import CannotStackError, ConfigurationError
from shoal.learners.base import BlockTrainer, Learner, StackableLearner
from shoal.types import Broadcast

logger = logging.getLogger("shoal")

FIRST = 20
"""The block size that the search starts from."""

UNSEARCHED = 20
"""The block size where last bits depend on it: to try several would make them a matter of chance."""


class VectorizedEngine:
    """Trains blocks of clients as one program each, with their parameters stacked on a first axis.

    Clients of a block have about the same number of samples. The updates are summed on the device.

    Args:
        block_size: The most clients in a block. None: the fastest is found in the first rounds where a client ends with
            the same bits in blocks of any size. Where it does not (with BatchNorm; with clients of unequal size, whose
            padding differs from block to block) it is 20, because equal runs shall end equal.

    Raises:
        ConfigurationError: The block size is not positive.
    """

    name = "vectorized"

    def __init__(self, block_size: int | None = None) -> None:
        if block_size is not None and block_size < 1:
            raise ConfigurationError(f"block_size must be at least 1, not {block_size}; None finds the fastest")
        self.block_size = block_size
        self._trainer: tuple[Learner, BlockTrainer] | None = None
        self._searches: dict[bool, BlockSearch] = {}  # by whether sizes may be tried
        self._last: BlockSearch | None = None

    def open(self, learner: Learner, clients: Population) -> None:
        """Tries two clients.

        Raises:
            ConfigurationError: The learner's clients cannot be stacked.
        """
        try:
            self.trainer(learner, clients.dataset)
        except CannotStackError as error:
            raise ConfigurationError(
                f"engine 'vectorized' cannot hold this learner: {error}; use engine='auto' or engine='sequential'"
            ) from error

    def trainer(self, learner: Learner, dataset: Dataset) -> BlockTrainer:
        """Returns what trains the blocks.

        Raises:
            CannotStackError: The learner's clients cannot be stacked; the message names the reason.
        """
        if self._trainer is None or self._trainer[0] is not learner:
            if not isinstance(learner, StackableLearner):
                raise CannotStackError(f"{type(learner).__name__} trains one client at a time")
            self._trainer, self._searches = (learner, learner.stacked(dataset)), {}
        return self._trainer[1]

    @property
    def settled(self) -> bool:
        """Whether the block size is found."""
        return self._last is not None and self._last.choice is not None

    @property
    def found_block_size(self) -> int | None:
        """The block size of the last round; None before the first."""
        return None if self._last is None else self._last.current[0]

    @property
    def found_variant(self) -> str | None:
        """The way in which the last round's blocks were run; None before the first."""
        return None if self._last is None else self._last.current[1]

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Sequence[ClientTask]) -> Iterator[Result]:
        """Yields a result for each block, those with the most work first."""
        if not tasks:
            return
        trainer = self.trainer(learner, tasks[0].data)
        search = self._last = self._search_for(trainer, tasks)
        sizes = [len(task.data) for task in tasks]
        amounts = {size: trainer.work(size) if size else 0 for size in set(sizes)}
        work = [amounts[size] for size in sizes]
        order, start = by_work(work), 0
        while start < len(order):
            size, variant = search.current
            block = next_block(order, work, start, size)
            started = time.perf_counter()
            results = self._attempt(learner, trainer, broadcast, [tasks[index] for index in block], variant)
            if results is None:
                search.refuse(len(block))
                continue
            if variant not in trainer.variants:
                search.leave(variant)
            elif search.choice is None and not trainer.warming_up:
                trainer.synchronize()
                search.record((time.perf_counter() - started) / max(sum(work[index] for index in block), 1))
                if self.settled:
                    trainer.settle(search.current[1])
            yield from results
            start += len(block)

    def close(self) -> None:
        """Lets go of the device's memory."""
        self._trainer = None

    def _search_for(self, trainer: BlockTrainer, tasks: Sequence[ClientTask]) -> BlockSearch:
        """Returns the search that a cohort's blocks take their size from; later rounds go on with it."""
        searchable = trainer.repeatable and len({len(task.data) for task in tasks}) == 1
        if searchable not in self._searches:
            self._searches[searchable] = self._new_search(trainer, len(tasks), searchable=searchable)
        return self._searches[searchable]

    def _new_search(self, trainer: BlockTrainer, cohort: int, *, searchable: bool) -> BlockSearch:
        if self.block_size is not None:
            return BlockSearch(self.block_size, self.block_size, trainer.variants, fixed=True)
        most = min(trainer.capacity(), cohort)
        if not searchable:
            return BlockSearch(min(most, UNSEARCHED), most, trainer.equal_variants, fixed=True)
        return BlockSearch(min(most, FIRST), most, trainer.variants)

    def _attempt(
        self, learner: Learner, trainer: BlockTrainer, broadcast: Broadcast, tasks: Sequence[ClientTask], variant: str
    ) -> list[Result] | None:
        """Returns the results of one block; None where it did not fit the device, and nothing is lost."""
        try:
            updates = trainer.fit(broadcast, [(task.data, task.rng()) for task in tasks], variant)
        except MemoryError as error:
            if len(tasks) > 1:
                logger.warning("a block of %d clients does not fit the device: halved", len(tasks))
                return None
            return [ClientResult(client=tasks[0].client, error=error)]
        except Exception as error:
            # Whose fault it is shows when each trains alone; the others' results are the same.
            logger.warning("a block failed (%s: %s); its clients train one by one", type(error).__name__, error)
            return [attempt(learner, broadcast, task) for task in tasks]
        return [BlockResult(clients=[task.client for task in tasks], updates=updates)]
