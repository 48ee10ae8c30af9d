"""Several workers share each cohort: real processes, their results, their ends, and what they say."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launches import (
    EXPERIMENT,
    LONG,
    QUICK,
    SOON,
    TESTS,
    Launch,
    assert_clean,
    assert_same,
    fault,
    federate,
    one_process,
    records,
    said,
    wait_for,
    wait_for_lines,
)


class TestTheSameRun:
    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_workers_end_where_one_process_does(self, nursery, alone, tmp_path, workers):
        launch = Launch(nursery, tmp_path, federate(tmp_path, "--engine", "distributed"), workers=workers)
        assert launch.codes() == [0] * workers, launch.told
        assert_same(tmp_path / "run", alone, atol=0 if workers == 1 else 1e-6)
        assert_clean(launch)
        assert launch.told[0].count("engine distributed: ") == 1

    def test_a_run_goes_on_with_another_number_of_workers(self, nursery, alone, tmp_path):
        for rounds, workers, more in ((2, 2, ()), (4, 3, ("--resume",)), (6, 1, ("--resume",))):
            launch = Launch(nursery, tmp_path, federate(tmp_path, "--rounds", rounds, *more), workers=workers)
            assert launch.codes() == [0] * workers, launch.told
        assert_same(tmp_path / "run", alone, atol=1e-6)

    def test_every_worker_of_a_script_gets_the_whole_result_of_each_call(self, nursery, tmp_path):
        folders = [tmp_path / "alone", tmp_path / "together"]
        for folder in folders:
            folder.mkdir()
        child = nursery.start("federations:script", output=folders[0] / "said", cwd=folders[0])
        launch = Launch(nursery, folders[1], run="federations:script", workers=3)
        assert launch.codes() == [0, 0, 0], launch.told
        assert child.wait() == 0
        assert launch.told == [""] * 3
        for seed in (3, 5):
            texts = [(folders[1] / f"worker-{rank}-{seed}.json").read_text() for rank in range(3)]
            assert texts[0] == texts[1] == texts[2]
            ours, theirs = json.loads(texts[0]), json.loads((folders[0] / f"worker-alone-{seed}.json").read_text())
            for part in ("params", "last"):
                for name in theirs[part]:
                    np.testing.assert_allclose(ours[part][name], theirs[part][name], rtol=0, atol=1e-6)
            assert ours["best"][:2] == theirs["best"][:2]
            assert ours["stopped"] == theirs["stopped"]
            assert [record["round"] for record in ours["history"]] == [1, 2, 3]


class TestFailingClients:
    def test_they_are_left_out_counted_and_named_once(self, nursery, tmp_path):
        more = ("--set", "failing=3", "--set", "max_failures=3", "--rounds", 3)
        (tmp_path / "alone").mkdir()
        assert one_process(nursery, tmp_path / "alone", *more)[0] == 0
        launch = Launch(nursery, tmp_path, federate(tmp_path, *more), workers=3)
        assert launch.codes() == [0, 0, 0], launch.told
        assert_same(tmp_path / "run", tmp_path / "alone/run", atol=1e-6)
        assert_clean(launch)
        warned = re.findall(r"client (\d) failed in round (\d): (.*); left out", launch.told[0])
        failed = [(record["round"], record["failed"]) for record in records(tmp_path / "run")]
        assert sorted((int(number), int(client)) for client, number, _ in warned) == [
            (number, client) for number, clients in failed for client in clients
        ]
        assert {what for *_, what in warned} == {"ZeroDivisionError: the user's own data"}
        assert len(warned) > 3

    @pytest.mark.parametrize("allowed", [0, 1])
    def test_one_too_many_ends_the_run_with_its_traceback(self, nursery, tmp_path, allowed):
        more = ("--set", "failing=5", "--set", f"max_failures={allowed}")
        launch = Launch(nursery, tmp_path, federate(tmp_path, *more), workers=3)
        assert launch.codes() == [1, 1, 1], launch.told
        assert_clean(launch)
        ((message,), *_) = said(launch)
        assert re.search(r"client \d failed in round 1: ZeroDivisionError: the user's own data \(.*allowed", message)
        assert 'federations.py", line' in launch.told[0]
        assert launch.told[0].endswith(f"{message}\n")


class TestEnds:
    @pytest.mark.parametrize(
        ("rank", "when", "place"),
        [
            (1, "after", "joining"),
            (2, "before", "agreeing"),
            (0, "after", "opening the folder"),
            (0, "before", "the first state"),
            (0, "before", "training"),
            (2, "before", "training"),
            (0, "after", "the sum"),
            (1, "before", "the sum"),
            (0, "before", "measuring"),
            (0, "before", "saving"),
            (0, "after", "delivering"),
            (2, "before", "the last copy"),
        ],
    )
    def test_wherever_a_worker_is_killed_the_others_end_and_say_which(
        self, nursery, alone, tmp_path, rank, when, place
    ):
        launch = Launch(
            nursery, tmp_path, federate(tmp_path), workers=3, fault=fault(place, rank, signal.SIGKILL, when)
        )
        codes = launch.codes(SOON)
        assert codes == [-signal.SIGKILL if one == rank else 1 for one in range(3)], launch.told
        pid = launch.children[rank].pid
        speaker = 1 if rank == 0 else 0
        for one, told in enumerate(said(launch)):
            expected = f"worker {rank} (process {pid} on {socket.gethostname()}) is gone: its process or its machine "
            assert told == ([expected + "has ended"] if one == speaker else []), launch.told
        if (tmp_path / "run/config.json").exists():
            assert one_process(nursery, tmp_path, "--resume")[0] == 0
            assert_same(tmp_path / "run", alone, atol=1e-6)

    @pytest.mark.parametrize(
        ("rank", "when", "place"),
        [
            (1, "before", "agreeing"),
            (0, "before", "training"),
            (2, "before", "training"),
            (1, "after", "the sum"),
            (0, "before", "measuring"),
            (0, "before", "saving"),
        ],
    )
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_wherever_a_worker_is_interrupted_the_state_is_saved(
        self, nursery, alone, tmp_path, rank, when, place, number, code
    ):
        launch = Launch(nursery, tmp_path, federate(tmp_path), workers=3, fault=fault(place, rank, number, when))
        assert launch.codes(SOON) == [code] * 3, launch.told
        assert_clean(launch)
        ((message,), *_) = said(launch)
        if place != "agreeing":
            assert re.fullmatch(
                r"stopped after round \d; the state is saved in .*; to go on: shoal .* --resume", message
            )
            assert one_process(nursery, tmp_path, "--resume")[0] == 0
            assert_same(tmp_path / "run", alone, atol=1e-6)

    @pytest.mark.parametrize(
        ("rank", "place"), [(2, "agreeing"), (1, "the first state"), (1, "the sum"), (0, "measuring"), (0, "saving")]
    )
    def test_what_one_worker_raises_is_told_once_with_its_traceback(self, nursery, tmp_path, rank, place):
        launch = Launch(nursery, tmp_path, federate(tmp_path), workers=3, fault=fault(place, rank, "raise"))
        assert launch.codes(SOON) == [1, 1, 1], launch.told
        assert_clean(launch)
        assert launch.told[0].count("ZeroDivisionError: a fault of the test's") <= 2
        assert 'federations.py", line' in launch.told[0]
        if rank:
            pid = launch.children[rank].pid
            failed = f"worker {rank} (process {pid} on {socket.gethostname()}) failed: ZeroDivisionError: a fault of"
            assert said(launch)[0] == [f"{failed} the test's"]

    def test_a_client_that_raises_on_one_worker_is_that_clients_failure(self, nursery, tmp_path):
        broken = fault("a client", 1, "raise")
        launch = Launch(nursery, tmp_path, federate(tmp_path), workers=2, fault=broken)
        assert launch.codes(SOON) == [1, 1], launch.told
        assert_clean(launch)
        assert re.search(
            r"^shoal: error: worker 1 \(.*\) failed: client \d failed in round 1: ZeroDivisionError: a fault",
            launch.told[0],
            re.M,
        )
        assert launch.told[0].count("\nTraceback") <= 2


class TestSilence:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_worker_that_stops_is_given_up(self, nursery, tmp_path, rank):
        launch = Launch(
            nursery, tmp_path, federate(tmp_path), workers=3, settings=QUICK,
            fault=fault("the sum", rank, signal.SIGSTOP, "after"),
        )  # fmt: skip
        others = [child for one, child in enumerate(launch.children) if one != rank]
        assert [child.wait(40) for child in others] == [1, 1]
        lines = [line for told in said(launch) for line in told]
        assert len(lines) == 1
        assert lines[0].startswith(f"worker {rank} (process {launch.children[rank].pid} ")
        assert lines[0].endswith("is gone: no sign of life for 2 seconds")

    def test_a_worker_with_a_long_client_is_not(self, nursery, alone, tmp_path):
        launch = Launch(nursery, tmp_path, federate(tmp_path), settings=QUICK, fault=fault("training", 1, 5.0))
        assert launch.codes() == [0, 0], launch.told
        assert_same(tmp_path / "run", alone, atol=1e-6)

    @pytest.mark.parametrize(("busy", "killed"), [(0, 2), (1, 2), (2, 0)])
    def test_a_death_ends_those_in_the_middle_of_a_long_client(self, nursery, tmp_path, busy, killed):
        launch = Launch(nursery, tmp_path, federate(tmp_path), workers=3, fault=fault("training", busy, 60.0))
        wait_for_lines(tmp_path / "run", 0)
        time.sleep(1.0)
        launch.children[killed].send(signal.SIGKILL)
        assert launch.codes(SOON) == [-signal.SIGKILL if one == killed else 1 for one in range(3)], launch.told
        assert sum(map(len, said(launch))) == 1


class TestMeeting:
    @pytest.mark.parametrize(
        ("rank", "message"),
        [
            (0, "of 3 workers 2 did not come in time: 1, 2"),
            (1, r"the workers were to meet at 127.0.0.1:\d+, and it cannot be reached: .*refused"),
        ],
    )
    def test_who_waits_in_vain_says_for_whom(self, nursery, tmp_path, rank, message):
        launch = Launch(
            nursery, tmp_path, federate(tmp_path), workers=3, ranks=[rank], settings={"shoal.engines.workers:JOIN": 1.0}
        )
        assert launch.codes(SOON) == [1]
        ((line,),) = said(launch)
        assert re.fullmatch(message, line)

    @pytest.mark.parametrize(("rank", "told"), [(0, "\nshoal: stopped before it began\n"), (1, "")])
    def test_who_waits_can_be_interrupted(self, nursery, tmp_path, rank, told):
        launch = Launch(nursery, tmp_path, federate(tmp_path), ranks=[rank])
        time.sleep(1.0)
        launch.children[0].send(signal.SIGTERM)
        assert launch.codes(SOON) == [143]
        assert launch.told == [told]

    def test_who_comes_later_is_waited_for(self, nursery, tmp_path):
        launch = Launch(nursery, tmp_path, federate(tmp_path), ranks=[1], settings=QUICK, workers=3)
        time.sleep(3.0)  # longer than a silence
        launch.start(0)
        time.sleep(3.0)
        launch.start(2)
        assert launch.codes() == [0, 0, 0], launch.told


class TestWhatCannotBe:
    @pytest.mark.parametrize(
        ("differs", "message"),
        [
            ("seed", "configuration.seed is 3 on worker 0 and 4 on worker 1: start all with the same command"),
            ("data", "configuration.clients.dataset.digest is '.*' on worker 0 and '.*' on worker 1: start all with"),
            ("file", r"worker 1 \(process \d+ on .*\): this machine lacks a file"),
        ],
    )
    def test_workers_that_differ_are_refused(self, nursery, tmp_path, differs, message):
        launch = Launch(nursery, tmp_path, federate(tmp_path, "--set", f"differs={differs}"), workers=3)
        assert launch.codes(SOON) == [2, 2, 2], launch.told
        self.assert_one_line(launch, message)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["gone.py"], "there is no experiment file gone.py"),
            ([EXPERIMENT, "--cohort", "9"], "a cohort of 9 clients was asked for"),
            ([EXPERIMENT, "--engine", "distribute"], "unknown engine 'distribute'; did you mean 'distributed'"),
            ([EXPERIMENT, "--workers", "2"], "torchrun has started the workers already: leave --workers out"),
            ([EXPERIMENT, "--max-restarts", "2", "--run-dir", "run"], "give --max-restarts to the launcher"),
            ([EXPERIMENT, "--run-dir", "run", "--resume"], "there is no run to resume in run"),
            ([EXPERIMENT, "--run-dir", "said-0"], "said-0 is a file: choose another run folder"),
        ],
    )
    def test_it_is_said_once(self, nursery, tmp_path, arguments, message):
        launch = Launch(nursery, tmp_path, ["federate", *arguments])
        assert launch.codes(SOON) == [2, 2], launch.told
        self.assert_one_line(launch, message)

    def test_a_folder_in_use_is_left_alone(self, nursery, tmp_path):
        user = nursery.start(
            "federations:command", output=tmp_path / "said", arguments=federate(tmp_path, "--set", "pause=0.1"), cwd="."
        )
        wait_for_lines(tmp_path / "run", 0)
        launch = Launch(nursery, tmp_path, federate(tmp_path, "--resume"))
        assert launch.codes(SOON) == [2, 2], launch.told
        self.assert_one_line(launch, f"run is in use by process {user.pid} on ")

    def test_a_folder_that_cannot_be_written_ends_all(self, nursery, tmp_path):
        launch = Launch(nursery, tmp_path, ["federate", EXPERIMENT, "--run-dir", "/proc/run"])
        assert launch.codes(SOON) == [1, 1], launch.told
        self.assert_one_line(launch, "/proc/run needs .* and its disk has 0.0 MB free")

    @staticmethod
    def assert_one_line(launch, message):
        assert_clean(launch)
        assert launch.told[0].count("\n") == 1, launch.told
        assert re.match(f"shoal: error: .*{message}", launch.told[0])


class Command:
    """A real launcher, in a process group of its own, and what it has started."""

    def __init__(self, folder, words):
        self._output = folder / "said"
        paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *map(str, words)], cwd=folder, env=os.environ | {"PYTHONPATH": paths},
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0,
            )  # fmt: skip
        self._seen = set()

    def workers(self):
        """Returns the workers' process ids, in the order of their ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self._seen.update(map(int, children))
        return sorted(map(int, children), key=rank_of)

    def wait(self, seconds=60):
        return self.process.wait(seconds)

    @property
    def told(self):
        return self._output.read_text()

    def close(self):
        """Kills all; fails if anything that it started has outlived it."""
        left = self.process.poll() is not None and [pid for pid in self._seen if not gone(pid)]
        for pid in (self.process.pid, *self._seen):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.wait(10)
        assert not left


@pytest.fixture
def start(tmp_path):
    """Starts real launchers."""
    started = []

    def make(*words):
        started.append(Command(tmp_path, words))
        return started[-1]

    yield make
    for command in started:
        command.close()


def rank_of(pid):
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), -1)


def gone(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def torchrun(folder, *options, arguments=()):
    return ["torch.distributed.run", "--nproc-per-node=2", *options, "-m", "shoal", *federate(folder, *arguments)]


@pytest.mark.slow
class TestLaunchers:
    def test_the_command_launches_workers_that_end_where_one_process_does(self, start, alone, tmp_path):
        command = start("shoal", *federate(tmp_path, "--workers", "2"))
        assert command.wait() == 0, command.told
        assert_same(tmp_path / "run", alone, atol=1e-6)
        assert "engine distributed: 2 workers, each with engine sequential" in command.told
        assert command.told.count("round 6/6") == 1

    def test_torchrun_does_and_starts_all_again_when_one_dies(self, start, alone, tmp_path):
        command = start(*torchrun(tmp_path, "--max-restarts=1", arguments=LONG))
        wait_for_lines(tmp_path / "run", 2)
        os.kill(command.workers()[1], signal.SIGKILL)
        assert command.wait() == 0, command.told
        assert_same(tmp_path / "run", alone, atol=1e-6)

    def test_max_restarts_goes_on_from_the_last_checkpoint(self, start, alone, tmp_path):
        command = start("shoal", *federate(tmp_path, "--workers", "2", "--max-restarts", "2", *LONG))
        for lines, rank in ((1, 0), (3, 1)):
            wait_for_lines(tmp_path / "run", lines)
            pid = command.workers()[rank]
            os.kill(pid, signal.SIGKILL)
            assert gone(pid)
            wait_for(lambda count=lines // 2 + 1: f"(restart {count} of at most 2)" in command.told)
        assert command.wait() == 0, command.told
        assert_same(tmp_path / "run", alone, atol=1e-6)
        lines = [line for line in command.told.splitlines() if line.startswith("shoal: ")]
        assert len(lines) == 6
        for restart, rank in ((0, 0), (1, 1)):
            names = re.findall(
                r"^shoal: (?:error: )?worker (\d) \(process (\d+)", "\n".join(lines[3 * restart :][:2]), re.M
            )
            assert len(names) == 2
            assert set(names) == {(str(rank), names[0][1])}

    @pytest.mark.parametrize(
        ("target", "number", "code"),
        [
            ("launcher", signal.SIGINT, 130),
            ("worker 1", signal.SIGTERM, 143),
            ("torchrun", signal.SIGTERM, 1),
            ("torchrun's group", signal.SIGINT, 1),
        ],
    )
    def test_whoever_is_interrupted_the_state_is_saved(self, start, nursery, alone, tmp_path, target, number, code):
        words = (
            torchrun(tmp_path, arguments=LONG)
            if "torchrun" in target
            else ["shoal", *federate(tmp_path, "--workers", "2", *LONG)]
        )
        command = start(*words)
        wait_for_lines(tmp_path / "run", 2)
        pids = command.workers()
        if target == "torchrun's group":  # as a terminal's Ctrl-C, for all of them
            os.killpg(command.process.pid, number)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        else:
            os.kill(pids[1] if target == "worker 1" else command.process.pid, number)
        assert command.wait() == code, command.told
        assert len(re.findall("^shoal: stopped after round", command.told, re.M)) == 1, command.told
        assert len(re.findall("^shoal: ", command.told, re.M)) == 1, command.told
        assert one_process(nursery, tmp_path, "--resume")[0] == 0
        assert_same(tmp_path / "run", alone, atol=1e-6)

    def test_workers_do_not_outlive_their_launcher(self, start, tmp_path):
        command = start("shoal", *federate(tmp_path, "--workers", "2", *LONG))
        wait_for_lines(tmp_path / "run", 1)
        pids = command.workers()
        command.process.kill()
        for pid in pids:
            assert gone(pid)
        assert "stopped after round" in command.told

    def test_a_number_of_workers_that_cannot_be_is_refused_at_once(self, start, tmp_path):
        command = start("shoal", *federate(tmp_path, "--workers", "0"))
        assert command.wait() == 2
        assert command.told == "shoal: error: --workers must be ≥ 1 and --max-restarts ≥ 0, not 0 and 0\n"
        command = start("shoal", "federate", EXPERIMENT, "--workers", "2", "--max-restarts", "1")
        assert command.wait() == 2
        assert command.told == "shoal: error: --max-restarts goes on from a run's folder: name it with --run-dir\n"


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(nursery, alone, tmp_path):
    chance = random.Random(7)
    kills = 0
    while kills < 8:
        launch = Launch(nursery, tmp_path, federate(tmp_path, *LONG), workers=2, restarts=1)
        time.sleep(chance.uniform(0.2, 3.0))
        victim = chance.randrange(2)
        launch.children[victim].send(signal.SIGKILL)
        kills += 1
        codes = launch.codes(SOON)
        assert codes[victim] in (0, -signal.SIGKILL), launch.told
        assert codes[1 - victim] in (0, 1), launch.told
    launch = Launch(nursery, tmp_path, federate(tmp_path), workers=2, restarts=1)
    assert launch.codes() == [0, 0], launch.told
    assert_same(tmp_path / "run", alone, atol=1e-6)
