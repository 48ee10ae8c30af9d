from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from process_table import alive, eventually, open_files
from shoal.deploy import run_process, site_run, site_server
from shoal.deploy.answer import Answer
from shoal.deploy.bridge import forward, site_address
from shoal.deploy.parcel import Parcel, raw
from shoal.deploy.request import Request
from shoal.deploy.site_server import SiteServer
from shoal.deploy.site_settings import SETTINGS, Allowed, Limits, settings_text
from shoal.errors import ConfigurationError, EngineError, StorageError
from shoal.processes.messages import receive, send

STAND_IN = [sys.executable, str(Path(__file__).parent / "run_stand_in.py")]

CLIENTS = {"site-1": 0, "site-2": 1}


class Running:
    """A site in a thread.

    Args:
        folder: Its own.
        does: What the stand-in for a run's process does.
        limits: The site's.
    """

    def __init__(self, folder, does=None, **limits):
        self.folder = folder
        allowed = Allowed(name="any", source="digits", settings=("lr",), config=does or {})
        second = Allowed(name="second", source="har", settings=("*",), config=does or {})
        (folder / SETTINGS).write_text(settings_text("site-1", [allowed, second], Limits(**limits)))
        self.server = SiteServer(folder, list(STAND_IN))
        self._thread = threading.Thread(target=self.server.serve)
        self._thread.start()

    def ask(self, kind="train", number=1, array=1.0, *, within=20.0, **more):
        """Returns the answer to a request, and its arrays."""
        request = Request(kind=kind, number=number, **{"run": "r1", "experiment": "any", "clients": CLIENTS, **more})
        tensors = {"params/w": raw(np.full(4, array, np.float32))} if kind in ("train", "evaluate") else {}
        found = forward(Parcel(meta=request.to_json(), tensors=tensors), self.folder, within=within)
        return Answer.from_json(found.meta), found.tensors

    def audit(self):
        path = self.folder / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def tasks(self, run="r1"):
        """Returns what the run's processes were given: kind, number, and which process it was."""
        path = self.folder / "logs" / f"{run}.tasks"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def close(self):
        self.server.stop()
        self._thread.join(10)
        self.server.close()
        for _, _, pid in self.tasks():
            assert not alive(int(pid))


@pytest.fixture
def begin(tmp_path, caplog):
    """Starts sites; at the end all of their processes and files are closed."""
    before = open_files()
    begun = []

    def start(does=None, **limits):
        folder = tmp_path / f"site{len(begun)}"
        folder.mkdir()
        begun.append(Running(folder, does, **limits))
        return begun[-1]

    yield start
    for running in begun:
        running.close()
        assert not running.server.address.folder.exists()
    # An error that was logged has a parcel in its traceback.
    caplog.get_records("call").clear()
    assert eventually(lambda: gc.collect() >= 0 and set(open_files()) <= set(before), 10)


def test_a_task_is_done_once_and_answered_as_often_as_it_is_asked_for(begin):
    site = begin({"sleep": 0.3})
    with ThreadPoolExecutor(4) as pool:
        answers = [job.result(20) for job in [pool.submit(site.ask) for _ in range(4)]]
    answers.append(site.ask())
    assert {(said.number, said.error, bytes(arrays["w"].data)) for said, arrays in answers} == {
        (1, "", np.ones(4, np.float32).tobytes())
    }
    assert [task[:2] for task in site.tasks()] == [["train", "1"]]
    assert site.ask(number=2)[0].number == 2
    assert len({pid for _, _, pid in site.tasks()}) == 1


def test_of_tasks_that_wait_only_the_newest_is_done(begin):
    site = begin({"sleep": 0.5})
    with ThreadPoolExecutor(5) as pool:
        jobs = []
        for number in range(1, 6):
            jobs.append(pool.submit(site.ask, number=number))
            assert eventually(lambda: len(site.tasks()) >= 1, 10)
            time.sleep(0.05)
        answers = [job.result(20)[0] for job in jobs]
    assert [said.error for said in answers] == ["", *["a newer task came before this one's turn did"] * 3, ""]
    assert [task[:2] for task in site.tasks()] == [["train", "1"], ["train", "5"]]


def test_another_run_is_told_that_the_site_is_busy(begin):
    site = begin(idle=0.6)
    assert site.ask()[0].error == ""
    said, _ = site.ask(run="r2")
    assert said.busy
    assert said.error == "this site works for run r1 of any"
    assert eventually(lambda: site.ask(run="r2")[0].error == "", 10)
    assert not alive(int(site.tasks()[0][2]))


def test_the_end_ends_the_processes_and_frees_the_site(begin):
    site = begin()
    site.ask()
    assert site.ask("end", number=2)[0].error == ""
    assert [task[:2] for task in site.tasks()] == [["train", "1"], ["end", "2"]]
    assert not alive(int(site.tasks()[0][2]))
    assert site.ask("end", number=2)[0].error == ""  # again, as after a lost answer
    assert len(site.tasks()) == 2  # for which nothing was started
    assert site.ask(run="r2")[0].error == ""


def test_the_end_in_the_midst_of_a_task_does_not_wait_for_it(begin):
    site = begin({"sleep": 60})
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(site.ask)
        assert eventually(site.tasks)
        started = time.monotonic()
        run_process.LEAVE, before = 0.5, run_process.LEAVE  # the stand-in sleeps, deaf to all
        try:
            assert site.ask("end", number=2)[0].error == ""
        finally:
            run_process.LEAVE = before
        assert time.monotonic() - started < 10
        assert "was stopped" in job.result(10)[0].error
    assert not alive(int(site.tasks()[0][2]))


def test_a_process_that_ends_is_told_and_replaced(begin):
    site = begin()
    site.ask()
    os.kill(int(site.tasks()[0][2]), signal.SIGKILL)
    said, _ = site.ask(number=2)
    if said.error:  # it was asked before its end was seen
        assert "was killed by SIGKILL (signal 9)" in said.error
        said, _ = site.ask(number=2)
    assert (said.error, said.number) == ("", 2)
    assert len({pid for _, _, pid in site.tasks()}) == 2


def test_a_process_that_ends_at_its_task_is_told_with_its_log(begin):
    site = begin({"ends": True})
    said, _ = site.ask()
    assert said.error == "the run's process at this site ended with exit code 3; its log is r1.log"
    assert not said.refused
    assert site.ask()[0].error == said.error
    assert len({pid for _, _, pid in site.tasks()}) == 2  # it was tried again


def test_after_an_error_the_next_task_finds_a_new_process(begin):
    site = begin({"error": "out of luck"})
    assert site.ask()[0].error == "out of luck"
    assert not alive(int(site.tasks()[0][2]))
    assert site.ask()[0].error == "out of luck"
    assert len({pid for _, _, pid in site.tasks()}) == 2


def test_a_process_that_gives_no_answer_is_ended(begin, monkeypatch):
    monkeypatch.setattr(site_run, "START", 0.5)
    monkeypatch.setattr(site_run, "MARGIN", 0.1)
    monkeypatch.setattr(run_process, "LEAVE", 0.2)
    site = begin({"sleep": 60}, seconds=0.4)
    said, _ = site.ask()
    assert said.error == "the run's process at this site gave no answer within 1 s"
    assert all(not alive(int(pid)) for _, _, pid in site.tasks())


def test_a_command_that_cannot_be_run_is_told(begin):
    site = begin()
    site.server._command[:] = ["/nowhere/python"]
    assert "the process of a run cannot be started: " in site.ask()[0].error


REFUSED = {
    "experiment": ({"experiment": "other"}, {}, "it does not allow an experiment other; allowed are any, second"),
    "setting": ({"settings": {"epochs": "9"}}, {}, "this site does not let a server set epochs of any"),
    "rounds": ({"rounds": 11}, {"rounds": 10}, "11 rounds were asked for, and it does at most 10"),
    "round": ({"round": 11}, {"rounds": 10}, "11 rounds were asked for, and it does at most 10"),
    "size": ({}, {"megabytes": 1e-5}, "a model of 0 MB was sent, and it takes at most 1e-05"),
    "NaN": ({"array": np.nan}, {}, "of the model that was sent params/w holds NaN or infinity"),
    "infinity": ({"array": np.inf}, {}, "of the model that was sent params/w holds NaN or infinity"),
    "clients": ({"clients": {"site-2": 0}}, {}, "the federation has no site site-1; it has site-2"),
    "no clients": ({"clients": {}}, {}, "the federation has no site site-1; it has none"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_beyond_the_site_is_refused_and_recorded(begin, kind):
    asked, limits, what = REFUSED[kind]
    site = begin(**limits)
    said, arrays = site.ask(**asked)
    assert (said.refused, said.busy, said.site, arrays) == (True, False, "site-1", {})
    assert said.error.startswith(what)
    (line,) = site.audit()
    assert {key: line[key] for key in ("kind", "run", "refused")} == {
        "kind": "train", "run": "r1", "refused": said.error
    }  # fmt: skip
    assert not site.tasks()


@pytest.mark.parametrize(
    ("does", "what"),
    [({"nan": True}, "w holds NaN or infinity"), ({"size": 10}, "its update has 0 MB, and this site sends at most")],
    ids=["nan", "size"],
)
def test_what_is_not_to_leave_does_not(begin, does, what):
    site = begin(does, megabytes=2e-5)
    said, arrays = site.ask()
    assert said.refused
    assert said.error.startswith(what)
    assert arrays == {}
    (line,) = site.audit()
    assert line["error"] == said.error
    assert line["sent"]["arrays"] == {}


def test_what_makes_no_sense_is_refused_in_one_line(begin):
    site = begin()
    for meta in (
        {},
        {"protocol": 7},
        {"protocol": 1, "kind": "dance"},
        {"protocol": 1, "kind": "train", "run": "../x"},
    ):
        said = Answer.from_json(forward(Parcel(meta=meta), site.folder, within=10).meta)
        assert said.refused
        assert said.error.startswith("the request makes no sense: ")
        assert "\n" not in said.error
    assert [line["refused"] for line in site.audit()] == [line["refused"] for line in site.audit()]
    assert len(site.audit()) == 4


def test_a_running_federation_is_not_disturbed_by_what_is_refused(begin):
    site = begin({"sleep": 0.5})
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(site.ask)
        assert eventually(site.tasks)
        assert site.ask(experiment="other", run="r2")[0].refused
        assert site.ask(run="r2")[0].busy
        assert site.ask("end", run="r2")[0].busy
        assert site.ask("hello", clients={}, run="r2")[0].error == ""  # it only says its name
        assert job.result(10)[0].error == ""


def test_a_server_that_was_started_again_leaves_the_first_behind(begin):
    site = begin()
    assert site.ask(attempt=0)[0].error == ""
    assert site.ask(attempt=1)[0].error == ""
    assert [task[:2] for task in site.tasks()] == [["train", "1"]] * 2  # its numbers are its own
    assert site.ask(attempt=0, number=2)[0].error == "run r1 was started again since, as attempt 1"


OTHER = {
    "experiment": ({"experiment": "second"}, "run r1 began with experiment any, and not with second"),
    "its settings": (
        {"experiment": "second", "settings": {"data": "/elsewhere"}},
        "run r1 began with experiment any, and not with second",
    ),
    "a later attempt": (
        {"experiment": "second", "attempt": 1},
        "run r1 began with experiment any, and not with second",
    ),
    "settings": ({"settings": {"lr": "9"}}, "run r1 of any began with other settings"),
    "no settings": ({"settings": {}}, "run r1 of any began with other settings"),
}


@pytest.mark.parametrize("kind", ["train", "end"])
@pytest.mark.parametrize("case", OTHER)
def test_a_run_goes_on_with_what_it_began_with(begin, case, kind):
    asked, what = OTHER[case]
    site = begin()
    assert site.ask(settings={"lr": "1"})[0].error == ""
    os.kill(int(site.tasks()[0][2]), signal.SIGKILL)  # its next process is told as the first was
    said, arrays = site.ask(kind, **{"number": 2, "settings": {"lr": "1"}, **asked})
    assert (said.refused, said.error, arrays) == (True, what, {})
    assert site.audit()[1:] == [{**site.audit()[1], "kind": kind, "run": "r1", "refused": what}]
    assert len(site.tasks()) == 1
    assert site.server._run.experiment == "any"


def test_a_server_that_was_started_again_may_have_other_settings(begin):
    site = begin({"notes": True})
    assert site.ask(settings={"lr": "1"})[0].error == ""
    assert site.ask(settings={"lr": "2"}, attempt=1)[0].error == ""
    told = [json.loads(line) for line in (site.folder / "logs" / "r1.told").read_text().splitlines()]
    assert [(one["source"], one["settings"]) for one in told] == [("digits", {"lr": "1"}), ("digits", {"lr": "2"})]
    assert site.ask(settings={"epochs": "2"}, attempt=2, number=2)[0].refused  # they are checked as ever
    assert site.ask(settings={"lr": "2"}, attempt=1, number=2)[0].error == ""


def test_what_a_runs_process_is_told_is_not_on_its_command_line(begin):
    site = begin({"notes": True, "password": "secret-word"})
    assert site.ask()[0].error == ""
    [[_, _, pid]] = site.tasks()
    assert b"secret-word" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert "secret-word" in (site.folder / "logs" / "r1.told").read_text()


def test_a_process_that_ends_at_once_is_told(begin):
    site = begin({"much": "x" * 1_000_000})  # more than a pipe holds
    site.server._command[:] = [sys.executable, "-c", "raise SystemExit(4)"]
    assert site.ask()[0].error == "the run's process at this site ended with exit code 4; its log is r1.log"


def test_strangers_are_not_served(begin, monkeypatch):
    monkeypatch.setattr(site_server, "INTRODUCTION", 0.3)
    site = begin()
    key = site_address(site.folder).key
    empty = os.memfd_create("x")
    sent = [({"key": key[::-1]}, empty), ({"key": 3}, empty), ({}, empty), ({"key": key}, None), ({"key": key}, empty)]
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, empty)
        streams = [stack.enter_context(site_address(site.folder).call(5.0)) for _ in range(2 + len(sent))]
        streams[0].send(b"\xff\xfe what?")  # and the second one says nothing
        for stream, (message, fd) in zip(streams[2:], sent, strict=True):
            send(stream, message, fd)
        for stream in streams:
            stream.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert receive(stream) is None
    assert site.ask()[0].error == ""
    assert [line["kind"] for line in site.audit()] == ["train"]


def test_many_strangers_at_once_are_turned_away_and_a_task_goes_on(begin, monkeypatch):
    monkeypatch.setattr(site_server, "INTRODUCTION", 0.5)
    monkeypatch.setattr(site_server, "CROWD", 8)
    site = begin({"sleep": 0.3})
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        job = pool.submit(site.ask)
        assert eventually(site.tasks)
        for _ in range(40):
            with contextlib.suppress(OSError):
                stack.enter_context(site_address(site.folder).call(5.0))
        assert job.result(10)[0].error == ""
        assert eventually(lambda: answered(site), 10)


def answered(site):
    with contextlib.suppress(EngineError):
        return site.ask(number=2, within=5)[0].error == ""


def test_nobody_else_may_even_connect(begin):
    site = begin()
    place = site.server.address.folder
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / "key").stat().st_mode & 0o777 == 0o600
    assert (place / "socket").stat().st_mode & 0o777 == 0o600


def test_a_record_that_cannot_be_written_keeps_the_answer_back(begin, monkeypatch):
    site = begin()

    def full(told):
        raise StorageError("audit.jsonl could not be written: the disk is full")

    monkeypatch.setattr(site.server._audit, "write", full)
    said, arrays = site.ask()
    assert said.error == "audit.jsonl could not be written: the disk is full"
    assert arrays == {}
    monkeypatch.undo()
    assert site.ask()[0].error == ""


def test_an_error_of_the_sites_own_is_an_answer(begin, monkeypatch, caplog):
    site = begin()
    monkeypatch.setattr(site.server, "_refusal", lambda request, parcel: 1 / 0)
    assert site.ask()[0].error == "the site failed: ZeroDivisionError: division by zero"


def test_the_record_has_the_hashes_of_what_came_and_went(begin):
    import hashlib

    site = begin()
    site.ask(number=3, array=2.0, round=7)
    (line,) = site.audit()
    assert (line["kind"], line["run"], line["experiment"], line["round"], line["number"]) == (
        "train",
        "r1",
        "any",
        7,
        3,
    )
    for way, name, value in (("received", "params/w", 2.0), ("sent", "w", 3.0)):
        array = np.full(4, value, np.float32)
        assert line[way]["bytes"] == 16
        assert line[way]["arrays"][name] == {
            "dtype": "float32",
            "shape": [4],
            "norm": 2 * value,
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }


def test_two_processes_do_not_share_a_folder(begin):
    site = begin()
    with pytest.raises(ConfigurationError, match="another shoal site runs in .*: stop it, or use another folder"):
        SiteServer(site.folder, STAND_IN)
    assert site.ask()[0].error == ""


def test_what_a_killed_process_has_left_is_replaced(tmp_path):
    site = Running(tmp_path)
    old = site.server.address.folder
    site.server.stop()
    site._thread.join(10)
    site.server._listener.close()  # and nothing more, as if it was killed
    site.server._lock_file.close()
    with pytest.raises(EngineError, match="cannot be reached"):
        site.ask()
    again = Running(tmp_path)
    assert not old.exists()
    assert again.ask()[0].error == ""
    again.close()
    with pytest.raises(ConfigurationError, match="no shoal site runs in .*: start it with `shoal site"):
        again.ask()


def test_a_site_that_says_nothing_is_not_waited_for(tmp_path):
    """Whoever forwards has a deadline, also against a process that is stopped."""
    from shoal.sites.address import Address

    address = Address.create()
    (tmp_path / "address.json").write_text(json.dumps({"socket": str(address.folder)}))
    with contextlib.closing(address.listen()) as listener:
        with pytest.raises(EngineError, match="gave no answer within 0.3 s"):
            forward(Parcel(meta={}), tmp_path, within=0.3)
        stream, _ = listener.accept()
        stream.close()
        thread = threading.Thread(target=answer_garbage, args=(listener,))
        listener.settimeout(10)
        thread.start()
        with pytest.raises(EngineError, match="what the shoal site in .* answered cannot be read"):
            forward(Parcel(meta={}), tmp_path, within=5)
        thread.join(10)
    address.remove()


def answer_garbage(listener: socket.socket):
    stream, _ = listener.accept()
    with stream:
        fd = os.memfd_create("x")
        send(stream, {"answer": True}, fd)
        os.close(fd)
        os.close(receive(stream)[1])
