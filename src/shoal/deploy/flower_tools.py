"""Flower's own commands: where they are, what they are told by the environment, and what they answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import EngineError, MissingExtraError

HOME = "flower-home"
"""The folder, in that of a deployment, with Flower's configuration and the apps it has unpacked."""

CONNECTION = "shoal"
"""How a deployment's SuperLink is called in that configuration."""

POLL = "0.25"
"""Seconds between two looks of Flower's for a process that is to be started; 1 by itself."""

LOOPBACK = ("127.0.0.1", "localhost")

TAIL = 12
"""Lines of a log that an error shows."""


def tool(name: str) -> str:
    """Returns the path of one of Flower's commands, of this Python's Flower where it has one.

    Raises:
        MissingExtraError: It is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise MissingExtraError("flwr", purpose=f"run {name}", extra="flower")
    return found


def environment(home: Path | None) -> dict[str, str]:
    """Returns the environment of Flower's processes.

    They send no telemetry, find each other's commands, and call this machine without a proxy.

    Args:
        home: Flower's folder; None for the user's own.
    """
    env = dict(os.environ)
    env |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    env.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", POLL)
    env["PATH"] = os.pathsep.join([str(Path(tool("flwr")).parent), env.get("PATH", os.defpath)])
    if home is not None:
        env["FLWR_HOME"] = str(home)
    direct = [name for said in ("no_proxy", "NO_PROXY") for name in env.get(said, "").split(",") if name]
    env["no_proxy"] = env["NO_PROXY"] = ",".join(dict.fromkeys([*direct, *LOOPBACK]))
    return env


def home_of(folder: Path) -> Path | None:
    """Returns Flower's folder of a deployment on this machine; None where the user's own is to be used."""
    home = (folder / HOME).resolve()
    return home if (home / "config.toml").exists() else None


def call(arguments: Sequence[str], env: Mapping[str, str], *, within: float) -> dict[str, Any]:
    """Runs a command of ``flwr`` that answers with JSON, and returns that.

    Args:
        arguments: Without ``flwr`` and without the format.
        env: From :func:`environment`.
        within: Seconds.

    Raises:
        EngineError: It failed, or took longer; with what it said.
    """
    command = [tool("flwr"), *arguments, "--format", "json"]
    asked = "flwr " + " ".join(arguments[:2])
    try:
        done = subprocess.run(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"`{asked}` gave no answer within {within:g} s: is the SuperLink up?") from error
    answer = json_in(done.stdout)
    if done.returncode or answer is None or not answer.get("success", False):
        said = (answer or {}).get("error-message") or last_lines(done.stderr or done.stdout)
        raise EngineError(f"`{asked}` failed: {said}")
    return answer


def json_in(text: str) -> dict[str, Any] | None:
    """Returns the JSON object that a text ends with, whatever lines are before it; None where there is none."""
    lines = text.splitlines()
    for number in (number for number, line in enumerate(lines) if line.startswith("{")):
        try:
            found = json.loads("\n".join(lines[number:]))
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


def last_lines(text: str, count: int = TAIL) -> str:
    """Returns the last lines of a text that say something."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:]) or "(nothing)"


def toml_string(text: str) -> str:
    """Returns a text as TOML writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
