"""What a tracker was given, as it reads back, and its processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def processes_of(run: Path) -> list[int]:
    """Returns the trackers' processes of a run."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _is_of(path, run)]


def _is_of(path: Path, run: Path) -> bool:
    try:
        line = path.read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return False
    return "shoal.runs.trackers" in line and str(run) in line


def tensorboard_events(folder: Path) -> list:
    """Returns the events in the files of a folder, in the order of their names."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        raw, place = path.read_bytes(), 0
        while place < len(raw):  # length, its checksum, the event, its checksum
            length = int.from_bytes(raw[place : place + 8], "little")
            found.append(Event.FromString(raw[place + 12 : place + 12 + length]))
            place += 16 + length
    return found


def wandb_records(run: Path) -> list[tuple[str, object]]:
    """Returns what lies in the offline folders of a run: the library's own messages, in a log of checksummed pieces."""
    script = """
import json, pathlib, sys
from wandb.proto.wandb_internal_pb2 import Record
for path in sorted(pathlib.Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    raw, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        message += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):
            continue
        record, message = Record.FromString(message), b""
        what = record.WhichOneof("record_type")
        if what == "history":
            told = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        elif what == "run":
            told = [record.run.run_id, record.run.display_name, record.run.project]
        elif what == "config":
            told = {item.key: json.loads(item.value_json) for item in record.config.update}
        elif what == "exit":
            told = record.exit.exit_code
        else:
            continue
        print(json.dumps([what, told]))
"""
    return [tuple(found) for found in asked(script, run)]


def mlflow_runs(run: Path) -> list[dict[str, object]]:
    """Returns the runs in a run's own store, as MLflow's client tells of them."""
    script = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{sys.argv[1]}/mlflow/mlflow.db")
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        history = {name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
                   for name in run.data.metrics}
        told = {"id": run.info.run_id, "experiment": experiment.name, "name": run.info.run_name,
                "status": run.info.status, "params": run.data.params, "tags": run.data.tags, "history": history}
        print(json.dumps(told))
"""
    return asked(script, run)


def asked(script: str, run: Path) -> list:
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(run)], capture_output=True, text=True, timeout=120, env=os.environ | quiet
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
