"""Programs of many small CUDA kernels, recorded once and replayed: to launch one takes longer than to run it.

A recorded program runs the same kernels on the same memory each time. So what differs from one run to the next is
copied into arrays of the recording's own before, and nothing in the program may wait for the device, copy from the
host, or draw random numbers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger("shoal")

MOST = 4
"""How many recordings are kept at once, because each has memory of its own: blocks of the usual size, and the last of a
round."""

T = TypeVar("T")

Arrays = Mapping[str, Tensor]

Program = Callable[[Arrays], dict[str, Tensor]]
"""Computes tensors from tensors."""

Step = Callable[[], dict[str, Tensor]]
"""A program whose inputs are where they are."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """A program that can be run again."""

    replay: Callable[[], object]
    """Runs it on what its inputs hold now."""
    results: dict[str, Tensor]
    """Hold what the last replay gave."""


class Recorder(Protocol):
    """Records programs."""

    def rehearse(self, program: Step) -> tuple[dict[str, Tensor], str | None]:
        """Runs a program as it will be when it is recorded; returns its results, and what stands against recording."""
        ...  # pragma: no cover

    def record(self, program: Step) -> Recorded:
        """Records a program that was rehearsed, without running it."""
        ...  # pragma: no cover


class CudaGraphs:
    """Records what a CUDA device is given to do, a :class:`Recorder`.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of its own, because libraries keep memory by stream: what the rehearsal got is there for the recording.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def rehearse(self, program: Step) -> tuple[dict[str, Tensor], str | None]:
        """Runs a program on the recording's stream, and watches whether the host waits for the device."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _watched() as waits:
            results = program()
        # The stream's memory may be used again at once: whatever runs there next waits for this stream first.
        current.wait_stream(self._stream)
        return results, "a step of it waits for the device, or copies from the host" if waits else None

    def record(self, program: Step) -> Recorded:
        """Captures a program.

        Raises:
            RuntimeError: It cannot be captured; an out-of-memory error is one.
        """
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        try:
            # The outer context gives the caller's stream back, which the inner one does not where the capture fails.
            # Other threads may use CUDA meanwhile: what they do is not held against this one.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                results = program()
        except BaseException:
            _end_allocation(self._device, pool)
            raise
        return Recorded(graph.replay, results)


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Yields a list that at the end holds torch's words on operations that waited for the device.

    A capture that meets one of those breaks, and does not leave everything as it was; so they are looked for before.
    """
    waits: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            waits.append(text)
        elif "ynchronization debug mode" not in text:  # torch's own, on the watching
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _end_allocation(device: torch.device, pool: Any) -> None:
    """Tells torch's allocator of the end of a capture that failed; until then it would hold memory back."""
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)  # noqa: SLF001
    except RuntimeError:  # the capture itself came to an end, and its graph gives the memory back
        return
    torch._C._cuda_releasePool(device.index, pool)  # noqa: SLF001


@dataclass(eq=False)
class _Recording:
    """A recorded program and its inputs."""

    inputs: dict[str, Tensor]
    recorded: Recorded
    checked: bool = False
    """Whether it came to the same as the program itself, on other inputs than those that it was recorded with."""

    def run(self, inputs: Arrays) -> dict[str, Tensor]:
        for name, own in self.inputs.items():
            own.copy_(inputs[name])
        self.recorded.replay()
        return self.recorded.results


class Recordings:
    """Programs that have run before, by what tells them apart.

    The first time a program runs as it is, because most come once. The second time it is rehearsed and recorded; the
    third time it is replayed, and must come to what the program itself comes to; from then on it is replayed. Where it
    cannot be recorded, comes to something else, or takes the memory that others need, one line says why, and all
    programs run as they are from then on.

    Args:
        recorder: How.
        coarsest: The dtype of the coarsest arithmetic. A replay may be off by half of its digits, because kernels that
            add up in any order differ from run to run.
    """

    def __init__(self, recorder: Recorder, coarsest: torch.dtype = torch.float32) -> None:
        self._recorder = recorder
        self._coarsest = coarsest
        self._fixed: tuple[object, ...] = ()
        self._seen: set[Hashable] = set()
        self._recordings: dict[Hashable, _Recording] = {}
        self.refusal: str | None = None
        """Why nothing is recorded any more."""
        self.last: Literal["plain", "warm-up", "replay"] = "plain"
        """How the last program ran. After a warm-up, another of its kind will run in another way."""

    def __len__(self) -> int:
        return len(self._recordings)

    def fix(self, *objects: object) -> None:
        """Says what the programs read in place; recordings that read something else are let go of."""
        if len(objects) != len(self._fixed) or any(a is not b for a, b in zip(objects, self._fixed, strict=True)):
            self.clear()
            self._fixed = objects

    def clear(self) -> None:
        """Lets go of all recordings and their memory."""
        self.keep(lambda _: False)

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Lets go of all recordings and their memory, but for those whose key is wanted."""
        self._recordings = {key: recording for key, recording in self._recordings.items() if wanted(key)}
        self._seen = {key for key in self._seen if wanted(key)}

    def pass_by(self, plain: Callable[[], T]) -> T:
        """Returns what a program gives that cannot be recorded."""
        self.last = "plain"
        return plain()

    def run(self, key: Hashable, program: Program, inputs: Arrays, *, plain: Step) -> dict[str, Tensor]:
        """Returns what a program gives, in memory that the next run may use.

        Args:
            key: Tells programs apart: equal keys, equal operations on arrays of equal shapes.
            program: What to run; nothing but its inputs, and what :meth:`fix` was told, may differ between runs.
            inputs: All that it reads and that differs from one run to the next.
            plain: Runs the same on the same inputs, in the cheapest way.
        """
        try:
            return self._run(key, program, inputs, plain)
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
        self._refuse("their memory leaves too little for the blocks")
        return self.pass_by(plain)

    def _run(self, key: Hashable, program: Program, inputs: Arrays, plain: Step) -> dict[str, Tensor]:
        recording = self._recordings.get(key)
        if recording is not None and recording.checked:
            self.last = "replay"
            return recording.run(inputs)
        if recording is None and (self.refusal is not None or len(self._recordings) >= MOST):
            return self.pass_by(plain)
        self.last = "warm-up"
        if recording is not None:
            return self._check(recording, inputs, plain)
        if key in self._seen:
            return self._record(key, program, inputs)
        self._seen.add(key)
        return plain()

    def _record(self, key: Hashable, program: Program, inputs: Arrays) -> dict[str, Tensor]:
        """Returns what a program gives, and records it."""
        own = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        results, obstacle = self._recorder.rehearse(lambda: program(own))
        if obstacle is not None:
            self._refuse(obstacle)
            return results
        try:
            self._recordings[key] = _Recording(own, self._recorder.record(lambda: program(own)))
        except Exception as error:
            self._refuse(_first_line(error))
        return results

    def _check(self, recording: _Recording, inputs: Arrays, plain: Step) -> dict[str, Tensor]:
        """Returns what the program itself comes to, and refuses recordings if a replay comes to something else."""
        expected = plain()
        try:
            found = recording.run(inputs)
            wrong = [name for name, tensor in expected.items() if not _agree(found[name], tensor, self._coarsest)]
        except RuntimeError as error:
            self._refuse(_first_line(error))
            return expected
        if wrong:
            self._refuse(f"a replay gives another {wrong[0]}")
        recording.checked = True
        return expected

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self.clear()
        logger.warning("blocks are not recorded as CUDA graphs, and run as before: %s", reason)


def _agree(found: Tensor, expected: Tensor, coarsest: torch.dtype) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = max(torch.finfo(dtype).eps for dtype in (expected.dtype, coarsest)) ** 0.5
    largest = expected.nan_to_num(posinf=0.0, neginf=0.0).abs().max() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * float(largest), equal_nan=True)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0] if lines else ''}"
    # The end of a broken capture raises an error of its own.
    return said if error.__context__ is None else f"{_first_line(error.__context__)}; {said}"
