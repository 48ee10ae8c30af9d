"""The launcher, with workers that are a few words of shell."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import typer

from shoal.cli import launch as module
from shoal.cli.launch import launch, launch_if_asked
from shoal.errors import ConfigurationError, Terminated

SOON = 10.0


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Returns a function that launches workers, one for each piece of shell, which must end in time."""
    shell = tmp_path / "python"
    shell.write_text('#!/bin/sh\ncd "$FOLDER"\neval "set --; $(cat do-$RANK)"\n')
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.setattr(module, "KILL", 0.5)

    def run(*scripts, **options):
        for rank, script in enumerate(scripts):
            (tmp_path / f"do-{rank}").write_text(script)
        began = time.monotonic()
        code = launch(len(scripts), ["federate", "x"], **options)
        assert time.monotonic() - began < SOON
        return code

    return run


@pytest.fixture
def interrupt():
    """Returns a function that sends this process a signal after some time, handled as by the command."""
    timers = []

    def terminate(*_):
        raise Terminated

    def send(number, seconds):
        timers.append(threading.Timer(seconds, signal.pthread_kill, (threading.main_thread().ident, number)))
        timers[-1].start()

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield send
    for timer in timers:
        timer.cancel()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]  # nobody has waited for it yet


def test_each_worker_gets_its_place(workers, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert workers(*["env > env-$RANK"] * 3) == 0
    every = [
        dict(line.split("=", 1) for line in (tmp_path / f"env-{rank}").read_text().splitlines() if "=" in line)
        for rank in range(3)
    ]
    assert [(env["RANK"], env["LOCAL_RANK"]) for env in every] == [("0", "0"), ("1", "1"), ("2", "2")]
    for env in every:
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"]) == ("3", "3", "127.0.0.1")
        assert env["MASTER_PORT"] == every[0]["MASTER_PORT"]
        assert env["OMP_NUM_THREADS"] == str(max(len(os.sched_getaffinity(0)) // 3, 1))
        assert env["TORCHELASTIC_RESTART_COUNT"] == "0"
        assert env["SHOAL_LAUNCHER"] == str(os.getpid())


def test_the_users_own_number_of_threads_is_kept(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert workers("echo $OMP_NUM_THREADS > threads") == 0
    assert (tmp_path / "threads").read_text() == "7\n"


@pytest.mark.parametrize(
    ("scripts", "code"),
    [(["", ""], 0), (["", "exit 3"], 3), (["exit 2", "sleep 0.1; exit 1"], 2), (["sleep 0.1; exit 1", "exit 2"], 1)],
)
def test_the_code_is_that_of_the_first_worker_that_has_one(workers, scripts, code, capfd):
    assert workers(*scripts) == code
    assert capfd.readouterr().err == ""


def test_a_worker_that_a_signal_ended_is_named(workers, capfd):
    assert workers("sleep 0.1", "kill -SEGV $$") == 1
    assert "worker 1 (process " in (told := capfd.readouterr().err)
    assert told.endswith(") was ended by SIGSEGV\n")
    assert told.count("\n") == 1


def test_when_one_has_failed_the_others_are_given_time_then_asked_then_killed(workers, tmp_path, capfd):
    patient = "trap 'echo asked > asked; exit 0' TERM; touch ready; while :; do sleep 0.05; done"
    deaf = "trap '' TERM; touch deaf; while :; do sleep 0.05; done"
    failing = "while [ ! -e ready -o ! -e deaf ]; do sleep 0.05; done; exit 3"
    began = time.monotonic()
    assert workers(failing, patient, deaf) == 3
    assert time.monotonic() - began > module.GRACE + module.KILL
    assert (tmp_path / "asked").exists()
    assert capfd.readouterr().err.endswith(") did not end and was killed\n")


def test_a_worker_that_ends_when_it_is_asked_is_not_blamed(workers, capfd):
    assert workers("exit 3", "while :; do sleep 0.05; done") == 3
    assert capfd.readouterr().err == ""


def test_what_a_worker_that_died_has_started_ends_too(workers, tmp_path):
    assert workers("", "sleep 100 & echo $! > child; kill -KILL $$") == 1
    pid, deadline = int((tmp_path / "child").read_text()), time.monotonic() + SOON
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("restarts", [0, 1, 2, 3])
def test_all_are_started_again_as_often_as_allowed(workers, restarts, tmp_path, capfd):
    script = "echo $TORCHELASTIC_RESTART_COUNT $MASTER_PORT >> starts; [ $TORCHELASTIC_RESTART_COUNT -ge 2 ]"
    assert workers("", script, max_restarts=restarts) == (0 if restarts >= 2 else 1)
    starts = [line.split() for line in (tmp_path / "starts").read_text().splitlines()]
    assert [count for count, _ in starts] == ["0", "1", "2"][: restarts + 1]
    said = capfd.readouterr().err.splitlines()
    assert said == [
        f"shoal: starting all 2 workers again (restart {one} of at most {restarts})" for one in (1, 2)[:restarts]
    ]


@pytest.mark.parametrize("code", [2, 130, 143])
def test_what_cannot_be_or_was_interrupted_is_not_tried_again(workers, code, tmp_path):
    assert workers(f"echo >> starts; exit {code}", max_restarts=3) == code
    assert (tmp_path / "starts").read_text() == "\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_passed_on_and_waited_for(workers, interrupt, number, code, tmp_path, capfd):
    saving = "trap 'sleep 0.8; touch saved-$RANK; exit 143' TERM; while :; do sleep 0.05; done"
    interrupt(number, 0.5)
    assert workers(saving, saving, max_restarts=3) == code
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert capfd.readouterr().err == ""


def test_an_interruption_after_the_end_of_the_run_changes_nothing(workers, interrupt):
    interrupt(signal.SIGINT, 0.5)
    assert workers("trap 'exit 0' TERM; while :; do sleep 0.05; done") == 0


def test_a_second_interruption_means_at_once(workers, interrupt, capfd):
    deaf = "trap '' TERM; while :; do sleep 0.05; done"
    interrupt(signal.SIGINT, 0.4)
    interrupt(signal.SIGINT, 0.9)
    assert workers(deaf, deaf, max_restarts=3) == 130
    assert capfd.readouterr().err.count("did not end and was killed") == 2


def test_after_an_interruption_nobody_waits_for_ever(workers, interrupt, monkeypatch):
    monkeypatch.setattr(module, "STOP", 0.5)
    interrupt(signal.SIGTERM, 0.4)
    assert workers("trap '' TERM; while :; do sleep 0.05; done") == 143


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "asked", "message"),
    [
        ({}, (0, 0), "--workers must be ≥ 1 and --max-restarts ≥ 0, not 0 and 0"),
        ({}, (-2, 0), "--workers must be ≥ 1"),
        ({}, (2, -1), "--max-restarts ≥ 0, not 2 and -1"),
        ({}, (None, 1), "--max-restarts starts failed workers again: say how many with --workers"),
        (TORCHRUN, (2, 0), "torchrun has started the workers already: leave --workers out"),
        (TORCHRUN, (None, 2), "give --max-restarts to the launcher"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(environment, asked, message, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message):
        launch_if_asked(asked[0], max_restarts=asked[1])


@pytest.mark.parametrize(("launcher", "asked", "launched"), [("1", 2, []), (None, None, []), (None, 2, [2])])
def test_only_a_command_that_is_no_worker_launches_what_was_asked(launcher, asked, launched, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SHOAL_LAUNCHER", raising=False)
    if launcher:
        monkeypatch.setenv("SHOAL_LAUNCHER", launcher)
    found = []
    monkeypatch.setattr(module, "launch", lambda workers, *_, **__: found.append(workers) or 0)
    with pytest.raises(typer.Exit) if launched else contextlib.nullcontext():
        launch_if_asked(asked)
    assert found == launched
