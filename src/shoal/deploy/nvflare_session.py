"""An administrator's session with a server of NVFlare, in a process of its own.

NVFlare's interface leaves threads behind with each session, prints, and may wait for long. So it runs in a child, with
which this process speaks in lines of JSON, and which it can end at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shoal.deploy.nvflare_job import MARK
from shoal.deploy.nvflare_project import environment
from shoal.errors import EngineError

CONNECT = 10.0
"""Seconds in which the server must take a session."""

CALL = 60.0
"""Seconds in which a call must be answered."""

LINE = 1 << 16

ENDED = f"received: {MARK}"
"""Before the reason in the line of the log that says that shoal's controller has ended the job."""


class Session:
    """A session; :meth:`close` ends it.

    Args:
        kit: The administrator's startup kit.
        user: The administrator.
    """

    def __init__(self, kit: Path, user: str) -> None:
        self._stream, childs = socket.socketpair()
        with childs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(kit), user],
                stdin=childs.fileno(),
                stdout=childs.fileno(),
                stderr=subprocess.DEVNULL,
                env=environment(),
                start_new_session=True,  # Ctrl-C is for this process, which may have something to say to the server
            )
        self._unread = b""

    def call(self, what: str, *arguments: str, within: float = CALL) -> Any:
        """Makes a call.

        Args:
            what: One of :data:`CALLS`.
            arguments: The call's.
            within: Seconds in which it must be answered.

        Raises:
            EngineError: It failed, or was not answered; in the latter case the session is over.
        """
        try:
            self._stream.sendall(json.dumps([what, *arguments]).encode() + b"\n")
        except OSError as error:
            raise EngineError("the session with NVFlare's server is over") from error
        answer = json.loads(self._line(what, within))
        if "error" in answer:
            raise EngineError(f"NVFlare's server did not {what}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Ends the session."""
        self._stream.close()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _line(self, what: str, within: float) -> bytes:
        until = time.monotonic() + within
        while b"\n" not in self._unread:
            self._stream.settimeout(max(until - time.monotonic(), 0.001))
            try:
                data = self._stream.recv(LINE)
            except TimeoutError as error:
                self._child.kill()
                raise EngineError(
                    f"NVFlare's server has not answered within {within:g} s when asked to {what}"
                ) from error
            except OSError:
                data = b""
            if not data:
                raise EngineError(f"the session with NVFlare's server ended when it was asked to {what}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line


@contextlib.contextmanager
def session(kit: Path, user: str) -> Iterator[Session]:
    """Yields a session, which is closed with the context."""
    opened = Session(kit, user)
    try:
        yield opened
    finally:
        opened.close()


def why_ended(lines: Sequence[str]) -> list[str]:
    """Returns what shoal's controller has said when it ended a job, from the lines of the log; nothing if it did not.

    Args:
        lines: Of the server's log.
    """
    return [line.split(ENDED, 1)[1] for line in lines if ENDED in line][:1]


def _clients(opened: Any) -> list[str]:
    return [client.name for client in opened.get_system_info().client_info]


def _log(opened: Any, job: str) -> list[str]:
    """Returns the lines of a job's log on the server that shoal has said."""
    text = opened.get_job_logs(job, "server")["logs"].get("server", "")
    return [line.split(MARK, 1)[1] for line in text.splitlines() if f" - {MARK}" in line]


def _errors(opened: Any, job: str) -> list[str]:
    """Returns why shoal has ended a job; where it has not, the last errors in the job's log on the server."""
    lines = opened.get_job_logs(job, "server")["logs"].get("server", "").splitlines()
    return why_ended(lines) or [line for line in lines if " - ERROR - " in line or "Error" in line][-10:]


def _abort(opened: Any, job: str) -> None:
    opened.abort_job(job)


CALLS: dict[str, Callable[..., Any]] = {
    "abort": _abort,
    "clients": _clients,
    "download": lambda opened, job, where: opened.download_job_result(job, where),
    "errors": _errors,
    "log": _log,
    "status": lambda opened, job: opened.get_job_status(job),
    "submit": lambda opened, folder: opened.submit_job(folder),
}
"""What a session can be asked for, by name."""


def main(kit: str, user: str) -> None:
    """Answers calls on standard input until that is closed."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what NVFlare prints is no reply
    opened: Any = None
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            opened = opened or _opened(kit, user)
            answer = {"result": CALLS[what](opened, *arguments)}
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
    if opened is not None:
        with contextlib.suppress(Exception):
            opened.close()
    os._exit(0)  # NVFlare's threads would keep it alive


def _end_with(parent: int) -> None:
    """Ends this process once its parent has ended, also in the middle of a call."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _opened(kit: str, user: str) -> Any:
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    return new_secure_session(user, kit, timeout=CONNECT)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
