"""Which worker of TensorFlow's this process is, and what workers tell each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from safetensors.numpy import load, save

from shoal.devices import TF_CONFIG, WORKERS, Launched, slurm_workers, tensorflow_config
from shoal.errors import ConfigurationError, WorkerError
from shoal.learners.keras_backend import tf
from shoal.types import Params


@dataclass(frozen=True)
class Cluster:
    """The workers that train one model together, and this process's place among them."""

    workers: tuple[str, ...]
    """The addresses, ``host:port``; the first one's is the chief."""
    index: int
    """Which one this is."""
    shares_machine: bool
    """Whether those on one machine have a device each; else a worker has all that it sees."""

    @classmethod
    def here(cls) -> Self | None:
        """Returns what shoal's launcher, ``TF_CONFIG`` or Slurm says of this process; None where nothing does.

        Raises:
            ConfigurationError: It cannot be understood.
        """
        place = Launched.here()
        if WORKERS in os.environ and place is not None:
            return cls(tuple(os.environ[WORKERS].split(",")), place.rank, shares_machine=True)
        if TF_CONFIG in os.environ:
            return cls._of_config(os.environ[TF_CONFIG])
        if place is not None and (workers := slurm_workers()) is not None:
            return cls(tuple(workers), place.rank, shares_machine=True)
        return None

    @classmethod
    def _of_config(cls, text: str) -> Self:
        try:
            told = json.loads(text)
            kinds, task = dict(told["cluster"]), dict(told["task"])
            workers = (*map(str, kinds.pop("chief", ())), *map(str, kinds.pop("worker", ())))
            index = int(task["index"]) + (task["type"] == "worker") * len(told["cluster"].get("chief", ()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(
                f'{TF_CONFIG} must be JSON such as {{"cluster": {{"worker": ["host:port", …]}}, "task": {{"type": '
                f'"worker", "index": 0}}}}: {type(error).__name__}: {error}'
            ) from error
        if kinds or task["type"] not in ("chief", "worker") or not 0 <= index < len(workers):
            raise ConfigurationError(
                f"{TF_CONFIG} must name a chief and workers alone, and this process among them, not {text:.200}"
            )
        if wrong := next((worker for worker in workers if not worker.rpartition(":")[2].isdigit()), None):
            raise ConfigurationError(f"{TF_CONFIG} names {wrong!r}, and a worker is host:port")
        return cls(workers, index, shares_machine=False)

    def announce(self) -> None:
        """Has TensorFlow find the workers where it looks for them."""
        os.environ[TF_CONFIG] = tensorflow_config(self.workers, self.index)


@contextmanager
def explained() -> Iterator[None]:
    """Raises what ends an exchange between workers as what it is; other errors pass.

    Raises:
        WorkerError: Another worker is gone.
        KeyboardInterrupt: It came while TensorFlow raised an error.
    """
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        raise WorkerError(f"another rank is gone, or did not answer in time: {reason(error)}") from error
    except RuntimeError as error:
        if "REPLACED BY KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from error
        raise


def reason(error: Exception) -> str:
    """Returns the line of one of TensorFlow's errors that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if "abort" in line or "unhealthy" in line or "closed" in line]
    return (telling or lines)[0].partition("}} ")[2] or (telling or lines)[0]


class WorkerGroup:
    """All workers of a strategy, as one of them sees them; all call the same in one order.

    Args:
        strategy: TensorFlow's.
        index: Which worker this is.
        count: How many there are.
    """

    def __init__(self, strategy: Any, index: int, count: int) -> None:
        self._strategy = strategy
        self.index = index
        self.count = count

    @classmethod
    def of(cls, strategy: Any) -> Self:
        """Returns the workers of a strategy; one, where all of its devices are this process's."""
        devices = len(strategy.extended.worker_devices)
        count = strategy.num_replicas_in_sync // devices
        return cls(strategy, strategy.cluster_resolver.task_id if count > 1 else 0, count)

    def share(self, tensors: Params | None, meta: Mapping[str, Any] | None) -> tuple[Params, dict[str, Any]]:
        """Returns what worker 0 gives; the others give None.

        Args:
            tensors: A flat tree of numpy's arrays.
            meta: JSON.

        Raises:
            WorkerError: A worker is gone.
        """
        if self.count == 1:
            return dict(tensors or {}), dict(meta or {})
        told = json.dumps(meta or {}).encode()
        own = {name: np.asarray(array) for name, array in (tensors or {}).items()}
        return load(self.from_leader(save(own))), json.loads(self.from_leader(told))

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Returns the numbers of every worker, in their order; each gives as many.

        Raises:
            WorkerError: A worker is gone.
        """
        table = np.zeros((self.count, len(numbers)), np.float64)
        table[self.index] = numbers
        return self._sum(table).tolist() if self.count > 1 else table.tolist()

    def from_leader(self, data: bytes | None) -> bytes:
        """Returns the bytes that worker 0 gives; what the others give does not count.

        Raises:
            WorkerError: A worker is gone.
        """
        own = b"" if data is None or self.index else data
        if self.count == 1:
            return own
        [[size], *_] = self.gather([len(own)])
        padded = own.ljust(-(-int(size) // 4) * 4, b"\0") if self.index == 0 else bytes(-(-int(size) // 4) * 4)
        # Sums of whole numbers with zeros, so that every bit comes as it was.
        return self._sum(np.frombuffer(padded, np.int32)).tobytes()[: int(size)]

    def _sum(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the sum over all workers, of one shape and dtype."""
        flat = tf.constant(numbers.reshape(-1))
        with explained(), self._strategy.scope():
            found: np.ndarray = self._exchanges[flat.dtype](flat).numpy()
        return found.reshape(numbers.shape)

    @cached_property
    def _exchanges(self) -> Mapping[Any, Callable[[Any], Any]]:
        """What sums vectors over all workers, by their dtype; compiled once for those of any length."""
        return {kind: self._exchange(kind) for kind in (tf.float64, tf.int32)}

    def _exchange(self, kind: Any) -> Callable[[Any], Any]:
        strategy = self._strategy
        devices = len(strategy.extended.worker_devices)

        def on_device(own: Any) -> Any:
            context = tf.distribute.get_replica_context()
            first = tf.get_static_value(context.replica_id_in_sync_group) % devices == 0
            return context.all_reduce("sum", tf.identity(own if first else tf.zeros_like(own)))

        def exchange(own: Any) -> Any:
            return strategy.experimental_local_results(strategy.run(on_device, args=(own,)))[0]

        compiled: Callable[[Any], Any] = tf.function(
            exchange, input_signature=[tf.TensorSpec([None], kind)], autograph=False
        )
        return compiled
