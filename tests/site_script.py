"""A site's script whose training is a function of what it is sent, and which goes wrong where a test says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import shoal.client

SIZE = 5


def trained(weights, seed):
    """Returns what training makes of the global model."""
    return (0.5 * weights + np.float32(seed % 1000 / 1000)).astype(np.float32)


def examples_of(site):
    """Returns how many examples a site has, by the number at the end of its name."""
    return int(site.rpartition("-")[2])


def act(does, task):
    """Goes wrong; returns whether the script is to go on with its next task, or None to go on as if nothing was."""
    weights = None if task is None else task.params["w"]
    match does:
        case "raise":
            raise RuntimeError("the user's own error")
        case "exit":
            sys.exit(0)
        case "code":
            sys.exit(7)
        case "sleep":
            time.sleep(600)
        case "kill" | "stop":
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[does])
        case "kill-launcher":
            os.kill(os.getppid(), signal.SIGKILL)
        case "spawn":
            subprocess.Popen(["sleep", "600"])
        case "again":  # a child of the script's that joins too
            code = "import shoal.client\nfor task in shoal.client.tasks(): raise SystemExit(9)"
            child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
            print(f"the child ended with {child.returncode}: {child.stderr.splitlines()[-1]}", flush=True)
        case "no-reply":
            return True
        case "nan":
            task.reply(params={"w": weights * np.nan}, examples=1)
            return True
        case "shape":
            task.reply(params={"w": np.zeros(3, np.float32)}, examples=1)
            return True
        case "name":
            task.reply(params={"v": weights}, examples=1)
            return True
        case "slow":
            time.sleep(5)
    return None


def main(told):
    """Is one rank.

    Args:
        told: ``pids``: a folder for a file of each process; ``pause``: seconds that a task takes; ``faults``: by site,
            what goes wrong (``does``) on which ``rank`` in which ``round`` (0: before the first task) and ``attempt``.
    """
    rank, site = int(os.environ.get("RANK", "0")), os.environ["SHOAL_SITE"]
    fault = told.get("faults", {}).get(site, {})
    wrong = (
        bool(fault) and rank == fault.get("rank", 0) and int(os.environ["SHOAL_ATTEMPT"]) in fault.get("attempts", [0])
    )
    for pid in (os.getpid(), os.getppid()):
        (Path(told["pids"]) / str(pid)).touch()
    print(f"hello from {site}", flush=True)
    if wrong and fault["round"] == 0:
        act(fault["does"], None)
    settings = shoal.client.config()
    for task in shoal.client.tasks(evaluate=told.get("evaluate", False)):
        if task.kind == "evaluate":
            task.reply(examples=examples_of(site), metrics={"accuracy": float(task.params["w"][0])})
            continue
        time.sleep(told.get("pause", 0.0))
        if wrong and task.round == fault["round"]:
            if fault["does"] == "break":
                break
            if act(fault["does"], task):
                continue
        result = trained(task.params["w"], task.seed)
        assert task.config == settings
        task.reply(params={"w": result}, examples=settings["examples"], metrics={"loss": float(task.round)})
        if wrong and task.round == fault["round"] and fault["does"] == "twice":
            task.reply(params={"w": result}, examples=1)
    print(f"the end of {site}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
