"""Forked processes that end by themselves, with the process that they were forked from, and without its clean-up."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NoReturn, TypeVar

T = TypeVar("T")

PR_SET_PDEATHSIG = 1

LOOK = 1.0
"""Seconds between two looks whether a process is still there."""


def fork(body: Callable[[], None]) -> int:
    """Runs ``body`` in a child of this process.

    The child has what this process has in memory. It ignores SIGINT, which a terminal sends to all of its processes,
    and every other signal that this process has a handler for; SIGTERM ends it. It ends with ``os._exit``, so that
    nothing that this process has yet to do is done there too.

    Returns:
        The child's process id. In the child it does not return.
    """
    flush_output()  # or the child would print it once more
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # That threads do not survive a fork is why the child works in new ones.
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            pid = os.fork()
            if pid == 0:
                _run(body)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def in_new_thread(work: Callable[[], T], look: Callable[[], None] = lambda: None) -> T:
    """Returns what ``work`` returns in a thread of its own.

    In a forked process the thread that forked still counts on OpenMP threads that did not survive, and waits for them
    for ever at its first parallel operation. A new thread starts new ones.

    Args:
        work: May raise.
        look: Called every second meanwhile.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not wait([future], LOOK).done:
            look()
        return future.result()


@contextlib.contextmanager
def leaving_garbage() -> Iterator[None]:
    """Keeps what is there now from the garbage collector, here for as long as the context lasts, in a fork for ever.

    A forked process must not collect what the other one has left: to end a store of ``torch.distributed``, for one,
    waits for its thread, which did not survive the fork.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def die_with(parent: int) -> None:
    """Has the system kill this process when its parent ends, also by SIGKILL.

    To be called in the child. The system means the parent's thread that forked, which must live as long as the parent.

    Args:
        parent: The parent's process id.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def flush_output() -> None:
    """Writes out what was printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, missing, or a pipe that nobody reads
            stream.flush()


def ending(code: int) -> str:
    """Returns how a process ended, in words.

    Args:
        code: Its exit code; below zero the signal that killed it, as ``os.waitstatus_to_exitcode`` tells.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-code}"
    why = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {name} (signal {-code}){why}"


def _run(body: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        gc.freeze()  # what the parent has left is not to be collected here: see `leaving_garbage`
        _take_signals()
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        flush_output()
        os._exit(code & 0xFF)


def _take_signals() -> None:
    """Leaves to the parent what it handles, and nothing of this process's signals to the parent."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
