"""How TensorFlow's workers find each other: what tells them, and where they meet before TensorFlow does."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

pytest.importorskip("tensorflow")

from shoal.devices import TF_CONFIG, WORKERS, tensorflow_config
from shoal.errors import ConfigurationError, WorkerError
from shoal.learners.keras_backend import tf
from shoal.learners.keras_cluster import Cluster, explained
from shoal.learners.keras_meeting import meet
from shoal.processes.ports import held_ports

RANKED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NODELIST": "gpu[1,3]",
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """Sets what tells a process its place, and nothing else of the kind."""
    for name in (TF_CONFIG, WORKERS, *RANKED, *SLURM):
        monkeypatch.delenv(name, raising=False)
    return lambda told: [monkeypatch.setenv(name, value) for name, value in told.items()]


def config(cluster, kind="worker", index=0):
    return {TF_CONFIG: json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


TOLD = {
    "nothing": ({}, None),
    "a launcher that knows no ports": (RANKED, None),
    "shoal's launcher": ({**RANKED, WORKERS: "a:1,b:2"}, (("a:1", "b:2"), 1, True)),
    "TF_CONFIG": (config({"worker": ["a:1", "b:2"]}, index=1), (("a:1", "b:2"), 1, False)),
    "a chief": (config({"chief": ["c:3"], "worker": ["a:1"]}, "chief"), (("c:3", "a:1"), 0, False)),
    "beside a chief": (config({"chief": ["c:3"], "worker": ["a:1"]}), (("c:3", "a:1"), 1, False)),
    "both": ({**RANKED, WORKERS: "a:1,b:2", **config({"worker": ["x:1"]})}, (("a:1", "b:2"), 1, True)),
}


@pytest.mark.parametrize("kind", TOLD)
def test_a_worker_finds_its_place(place, kind):
    told, expected = TOLD[kind]
    place(told)
    assert Cluster.here() == (expected and Cluster(*expected))


def test_slurm_tells_the_workers(place):
    place(SLURM)
    found = Cluster.here()
    assert [worker.partition(":")[0] for worker in found.workers] == ["gpu1", "gpu1", "gpu3"]
    assert found.workers[0] != found.workers[1]
    assert found.index == 2


@pytest.mark.parametrize(
    "told",
    [
        {TF_CONFIG: "no"},
        {TF_CONFIG: "[]"},
        {TF_CONFIG: '{"cluster": {}}'},
        config({"worker": ["a:1"]}, index=1),
        config({"worker": ["10.0.0.1"]}),
        config({"worker": ["a:1"]}, "evaluator"),
        config({"worker": ["a:1"], "ps": ["b:1"]}),
    ],
)
def test_what_cannot_be_understood_is_refused(place, told):
    place(told)
    with pytest.raises(ConfigurationError, match="^TF_CONFIG (must|names) "):
        Cluster.here()


def test_tensorflow_is_told_in_its_own_words():
    told = tensorflow_config(["a:1", "b:2"], 1)
    assert json.loads(told) == {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}


def met(workers, index, within, found):
    try:
        meet(workers, index, shared=True, within=within)
        found[index] = "met"
    except WorkerError as error:
        found[index] = str(error)


def test_workers_meet_whoever_comes_first_and_the_port_is_free_afterwards():
    with held_ports(3) as [port, *others]:
        workers = [f"127.0.0.1:{port}", *(f"b:{other}" for other in others)]
        found: dict[int, str] = {}
        threads = [threading.Thread(target=met, args=(workers, index, 20.0, found)) for index in (2, 0, 1)]
        threads[0].start()
        time.sleep(0.5)
        threads[1].start()
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n")
            threads[2].start()
            for thread in threads:
                thread.join(30)
        assert found == {0: "met", 1: "met", 2: "met"}
        socket.create_server(("127.0.0.1", port), reuse_port=True).close()


def test_who_does_not_come_is_told_in_time():
    with held_ports(3) as [port, *others]:
        workers = [f"127.0.0.1:{port}", *(f"b:{other}" for other in others)]
        found: dict[int, str] = {}
        started = time.monotonic()
        threads = [threading.Thread(target=met, args=(workers, index, 2.0, found)) for index in (0, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert time.monotonic() - started < 10
    assert found[0] == f"of 3 workers b:{others[0]} did not come within 2 s"
    assert found[2] == f"worker 0 did not answer at 127.0.0.1:{port} within 2 s, and worker 2 gives up"


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for index, workers in enumerate(([address, "b:1"], ["b:1", address])):
            with pytest.raises(WorkerError, match=f"worker {index} cannot listen at {address}: .*in use"):
                meet(workers, index, shared=False, within=2.0)


def test_who_is_slow_to_say_its_name_is_waited_for():
    with held_ports(2) as [port, other]:
        found: dict[int, str] = {}
        chief = threading.Thread(target=met, args=([f"127.0.0.1:{port}", f"b:{other}"], 0, 20.0, found))
        chief.start()
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:
            time.sleep(0.6)
            slow.sendall(b"1")
            assert slow.recv(2) == b"go"
        chief.join(30)
        assert found == {0: "met"}


def test_one_worker_meets_nobody():
    with socket.create_server(("127.0.0.1", 0)) as taken:  # where it could not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        meet([address], 0, shared=False, within=0.0)
        with pytest.raises(WorkerError, match="cannot listen"):
            meet([address, "b:1"], 0, shared=False, within=0.0)


LOST = """{{function_node f}} Graph execution error:

Detected at node adam/CollectiveReduceV2
Collective ops is aborted by: Socket closed
"""


@pytest.mark.parametrize("error", [tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError])
def test_a_lost_worker_is_told_as_what_it_is(error):
    told = "^another rank is gone, .*: Collective ops is aborted by: Socket closed$"
    with pytest.raises(WorkerError, match=told), explained():
        raise error(None, None, LOST)


def test_what_has_nothing_to_do_with_workers_passes():
    for error in (tf.errors.InvalidArgumentError(None, None, "x"), RuntimeError("y"), ValueError("z")):
        with pytest.raises(type(error)), explained():
            raise error
    with pytest.raises(KeyboardInterrupt), explained():
        raise RuntimeError("pybind11: UnavailableError REPLACED BY KeyboardInterrupt")
