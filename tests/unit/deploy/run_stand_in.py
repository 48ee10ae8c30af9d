"""Is in the place of a run's process: it answers as its settings say, and needs no framework."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np

from shoal.deploy.answer import Answer
from shoal.deploy.parcel import Parcel, raw, read_parcel, write_parcel
from shoal.processes.messages import receive, send


def main():
    number, told = int(sys.argv[1]), json.load(sys.stdin)
    does, log = told["config"], Path(told["logs"] + ".tasks")
    assert sys.stdin.read() == ""  # there is no more
    if does.get("notes"):
        with Path(told["logs"] + ".told").open("a") as file:
            file.write(json.dumps(told) + "\n")
    with socket.socket(fileno=number) as channel:
        while (received := receive(channel)) is not None:
            parcel = read_parcel(received[1])
            task = parcel.meta
            with log.open("a") as file:
                file.write(f"{task['kind']} {task['number']} {os.getpid()}\n")
            if task["kind"] != "end":
                time.sleep(does.get("sleep", 0.0))
            if does.get("ends"):
                raise SystemExit(3)
            value = float("nan") if does.get("nan") else float(task["number"])
            tensors = {"w": raw(np.full(does.get("size", 4), value, np.float32))} if task["kind"] == "train" else {}
            said = Answer(site=told["site"], number=task["number"], error=does.get("error", ""), examples=1.0)
            fd = write_parcel(Parcel(meta=said.to_json(), tensors=tensors))
            send(channel, {"answer": True}, fd)
            os.close(fd)


if __name__ == "__main__":
    main()
