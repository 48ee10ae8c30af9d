from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load, save

import shoal
from lightning_modules import Classifier, CpuFsdp, Dying, Failing, Scheduled, fit, ranked
from shoal import trees
from shoal.cli.exits import REFUSED
from shoal.cli.main import main
from shoal.data import ArrayDataset
from shoal.errors import ConfigurationError, DataError, WorkerError
from shoal.learners import lightning_watch
from shoal.learners.base import Learner, RankedLearner
from shoal.learners.lightning_carrier import Carrier
from shoal.learners.lightning_state import pack, unpack
from shoal.learners.lightning_trainer import SILENCE, fit_trainer
from shoal.types import Broadcast, ModelState
from support import BatchNormNet, assert_equal, learner, population, samples

TESTS = Path(__file__).parents[2]


def lightning(module=Classifier, *, trainer=None, **settings):
    options = {"accelerator": "cpu"} | (trainer or {})
    return shoal.LightningLearner(module, trainer=options, **({"batch_size": 4} | settings))


def test_it_is_a_learner_and_its_calls_leave_no_trace():
    ours = lightning(partial(Classifier, BatchNormNet))
    assert isinstance(ours, Learner)
    assert isinstance(ours, RankedLearner)
    with ours.together() as trainer:
        assert trainer is ours
    environment = dict(os.environ)
    first = fit(ours)
    assert_equal(fit(ours).delta, first.delta)
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized()
    assert_equal(ours.init(0).params, lightning(partial(Classifier, BatchNormNet)).init(0).params)


@pytest.mark.parametrize("strategy", ["ddp", CpuFsdp()], ids=["ddp", "fsdp"])
def test_a_distributed_strategy_on_one_device_starts_nothing(strategy):
    environment = dict(os.environ)
    for _ in range(2):
        update = fit(lightning(trainer={"strategy": strategy, "devices": 1}))
        assert_equal(update.delta, fit(lightning()).delta, atol=1e-7)
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized()


def test_the_metrics_are_means_over_all_passes_however_they_are_logged():
    class Logging(Classifier):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.log("by_epoch", loss, on_step=False, on_epoch=True)
            self.log("by_both", loss, on_step=True, on_epoch=True)
            if index % 2 == 0:
                self.log("at_times", torch.tensor(float(index)))
            return loss

        def on_train_epoch_end(self):
            self.log("epoch", float(self.current_epoch))

    metrics = fit(lightning(Logging, epochs=2)).metrics
    loss = fit(learner(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), epochs=2)).metrics["loss"]
    assert metrics == pytest.approx(
        {"loss": loss, "by_epoch": loss, "by_both": loss, "at_times": (4 * 0 + 4 * 2 + 4 * 4) / 12, "epoch": 0.5}
    )


def test_evaluation_weighs_each_example_the_same():
    ours, theirs = lightning(eval_batch_size=7), learner()
    expected = theirs.evaluate(theirs.init(0), samples(40))
    assert ours.evaluate(ours.init(0), samples(40)) == pytest.approx(expected, abs=1e-6)


def test_a_test_step_will_do_for_evaluation_and_without_either_it_says_so():
    class Neither(Classifier):
        validation_step = LightningModule.validation_step

    class Tested(Neither):
        test_step = Classifier.validation_step

    expected = lightning().evaluate(lightning().init(0), samples(9))
    assert lightning(Tested).evaluate(lightning().init(0), samples(9)) == expected
    with pytest.raises(ConfigurationError, match="Neither has no validation_step and no test_step"):
        lightning(Neither).evaluate(lightning().init(0), samples(9))


class Order:
    """A generator whose permutations are given, so that two calls can see what one call sees."""

    def __init__(self, *permutations):
        self.bit_generator = self
        self._permutations = list(permutations)

    def random_raw(self):
        return 5

    def permutation(self, count):
        return self._permutations.pop(0)


@pytest.mark.parametrize("strategy", ["auto", "ddp_fork"])
def test_training_goes_on_where_it_was_saved(strategy):
    data, model = samples(22), lightning(Scheduled).init(0)
    orders = [np.random.default_rng(seed).permutation(22) for seed in range(4)]
    options = {} if strategy == "auto" else {"strategy": strategy, "devices": 2}
    once = lightning(Scheduled, trainer=options, epochs=4, keep_optimizer=True)
    expected = once.fit(Broadcast(round=1, model=model), data, Order(*orders))

    params, saved = model, None
    for half in (orders[:2], orders[2:]):
        ours = lightning(Scheduled, trainer=options, epochs=2, keep_optimizer=True)
        assert ours.carried() == ({}, {})
        if saved:
            ours.take_up(load(saved[0]), json.loads(saved[1]))
        update = ours.fit(Broadcast(round=1, model=params), data, Order(*half))
        params = ModelState(params=trees.advance(params.params, update.delta))
        tensors, meta = ours.carried()
        saved = save(tensors), json.dumps(meta)
    whole = trees.advance(model.params, expected.delta)
    assert_equal(params.params, whole, atol=1e-7)
    tensors, meta = once.carried()
    assert meta == json.loads(saved[1])
    assert (meta["epochs"], meta["steps"]) == (4, 4 * (6 if strategy == "auto" else 3))
    assert_equal(load(saved[0]), tensors, atol=1e-6)


def test_without_keep_optimizer_there_is_nothing_to_carry():
    with pytest.raises(ConfigurationError, match="keep_optimizer=True"):
        lightning().carried()
    with pytest.raises(ConfigurationError, match="keep_optimizer=True"):
        lightning().take_up({}, {})
    ours = lightning(Scheduled, keep_optimizer=True)
    fit(ours)
    other = lightning(keep_optimizer=True)
    other.take_up(*ours.carried())
    with pytest.raises(ConfigurationError, match="state taken up is of 2 schedulers, but the module configures 0"):
        fit(other)


def test_states_come_back_from_tensors_and_json():
    state = {0: {"step": torch.tensor(3.0), "betas": (0.9, [1, None])}, "m": Counter({2: 1}), "x": np.float64(0.5)}
    tensors, meta = pack(state)
    back = unpack(load(save(tensors)), json.loads(json.dumps(meta)))
    assert back == state
    assert isinstance(back["m"], Counter)
    with pytest.raises(ConfigurationError, match="a function at state.f, which cannot be carried without pickle"):
        pack({"f": samples})


@pytest.mark.parametrize(
    ("module", "said"),
    [(Dying, "rank 1 of the training was killed by SIGKILL"), (Failing, "rank 1 .*ZeroDivisionError: the user's own")],
)
def test_a_rank_that_ends_ends_the_call(module, said):
    environment, begun = dict(os.environ), time.monotonic()
    with pytest.raises(WorkerError, match=said) as caught:
        fit(ranked("ddp_fork", module))
    assert "exit code -9" in str(caught.value) or module is Failing
    assert time.monotonic() - begun < 45
    assert dict(os.environ) == environment
    assert fit(ranked("ddp_fork")).weight == 22


def test_ranks_that_do_not_start_end_the_call(monkeypatch):
    monkeypatch.setattr(lightning_watch, "START", 2.0)
    monkeypatch.setattr(Carrier, "setup", lambda *given, **named: time.sleep(60))  # forked ranks have it too
    begun = time.monotonic()
    with pytest.raises(WorkerError, match="ranks 0, 1 did not start within 2 s, and all were ended"):
        fit(ranked("ddp_fork"))
    assert time.monotonic() - begun < 20


def test_ranks_on_a_cpu_wait_a_minute_or_as_long_as_the_user_says():
    def patience(strategy):
        return fit_trainer({"accelerator": "cpu", "devices": 2, "strategy": strategy}).strategy._timeout

    assert patience("ddp_spawn") == patience("ddp_fork_find_unused_parameters_true") == SILENCE
    assert patience(DDPStrategy(start_method="spawn", timeout=timedelta(seconds=5))) == timedelta(seconds=5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainer": {"max_epochs": 3}}, "trainer option max_epochs .* say epochs= or steps="),
        ({"trainer": {"limit_train_batches": 3}}, "trains on all of its data"),
        ({"loaders": {"shuffle": True}}, "'shuffle': .* the learner draws the batches"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"epochs": 2, "steps": 3}, "leave one out"),
    ],
)
def test_what_the_learner_decides_itself_is_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        lightning(**settings)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "ddp", "devices": 2}, "use strategy='ddp_spawn', or start the program with torchrun --nproc_per"),
        ({"devices": 2}, "use strategy='ddp_spawn'"),
        ({"strategy": "fsdp", "devices": 2}, "Lightning refuses .* requires a GPU"),
        (
            {"strategy": ModelParallelStrategy(), "devices": 2},
            "ModelParallelStrategy divides .* use strategy='fsdp'",
        ),
        (
            {"strategy": CpuFsdp(), "devices": 2},
            "CpuFsdp with 2 devices .* each: start .* torchrun --nproc",
        ),
        (
            {"strategy": CpuFsdp(use_orig_params=False), "devices": 1},
            "use_orig_params=False trains arrays without",
        ),
        (
            {"strategy": CpuFsdp(), "devices": 1, "gradient_clip_val": 1.0},
            "FSDP does not: say gradient_clip_algo",
        ),
        ({"strategy": "dpp"}, "Lightning refuses the trainer options: .*dpp"),
        ({"strategy": "ddp_spawn", "devices": 2, "num_nodes": 2}, "is for one machine"),
        ({"speed": 3}, "Lightning refuses the trainer options: .*speed"),
    ],
)
def test_trainers_that_cannot_be_are_refused_before_training(options, said):
    with pytest.raises(ConfigurationError, match=said):
        lightning(trainer=options).check(samples(5))


def test_fsdp_cannot_have_a_module_that_optimizes_by_hand():
    class ByHand(Classifier):
        automatic_optimization = False

    with pytest.raises(ConfigurationError, match="ByHand optimizes by hand, .* use strategy='ddp'"):
        fit(lightning(ByHand, trainer={"strategy": CpuFsdp(), "devices": 1}))


def test_a_trainer_must_have_a_device_for_each_rank(monkeypatch):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}
    for name, value in (place | {"MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "it"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="3 processes were started, .* has 2 devices: say devices=3 in"):
        fit(ranked("ddp"))
    with pytest.raises(ConfigurationError, match="3 processes were started, and strategy 'single' has one"):
        shoal.train(lightning(), samples(9), epochs=1)
    told = lightning().on(shoal.Devices("ddp", accelerator="cpu"))
    assert (told.trainer["devices"], told.devices.count) == (3, 3)
    two_machines = place | {"WORLD_SIZE": "6"}
    for name, value in two_machines.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="has 2 devices: say devices=3, num_nodes=2 in"):
        fit(ranked("ddp"))
    told = lightning().on(shoal.Devices("ddp", count=6, accelerator="cpu"))
    assert (told.trainer["devices"], told.trainer["num_nodes"], told.devices.count) == (3, 2, 6)


def test_started_ranks_do_not_start_others(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigurationError, match="a launcher has started some already: use strategy='ddp'"):
        fit(ranked("ddp_spawn"))


def test_misfits_show_in_the_check():
    lightning().check(samples(5))
    wrong = samples(5)
    with pytest.raises(DataError, match="does not take the data: RuntimeError: mat1 and mat2"):
        lightning().check(ArrayDataset(wrong.inputs[:, :4], wrong.targets()))
    with pytest.raises(DataError, match="Target 9 is out of bounds"):
        lightning().check(ArrayDataset(wrong.inputs, np.array([0, 1, 1, 9, 0])))
    model, nothing = lightning().init(0), ArrayDataset(wrong.inputs[:0], wrong.targets()[:0])
    with pytest.raises(DataError, match="there is no example to train on"):
        lightning().fit(Broadcast(round=1, model=model), nothing, np.random.default_rng(0))
    with pytest.raises(DataError, match="there is no example to evaluate on"):
        lightning().evaluate(model, nothing)


def test_devices_tell_of_the_trainer_and_change_it():
    ours = lightning(trainer={"precision": "bf16-mixed"}, threads=1)
    assert ours.devices == shoal.Devices(accelerator="cpu", precision="bf16", threads=1)
    there = ours.on(shoal.Devices(accelerator="cuda", precision="fp16"))
    assert there.trainer == {"accelerator": "cuda", "precision": "16-mixed"}
    assert there.devices == shoal.Devices(accelerator="cuda", precision="fp16")
    assert ours.describe()["trainer"] == {"precision": "bf16-mixed"}
    assert ours.on(ours.devices).trainer == ours.trainer


DDP, FSDP = {"strategy": "ddp", "devices": 2}, {"strategy": CpuFsdp(), "devices": 2}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (DDP, ("ddp", 2)),
        ({"devices": "2"}, ("ddp", 2)),
        ({"strategy": "ddp_find_unused_parameters_true", "devices": 2, "num_nodes": 3}, ("ddp", 6)),
        (FSDP, ("fsdp", 2)),
        ({"strategy": DDPStrategy(), "devices": 2}, ("ddp", 2)),
        ({"strategy": DDPStrategy(start_method="fork"), "devices": 2}, ("single", None)),
        ({"strategy": "ddp_spawn", "devices": 2}, ("single", None)),
        ({"strategy": "ddp_notebook_find_unused_parameters_true", "devices": 2}, ("single", None)),
        ({"strategy": "ddp", "devices": 1}, ("single", None)),
        ({"strategy": "ddp"}, ("single", None)),
        ({"strategy": CpuFsdp(), "devices": 1}, ("single", None)),
    ],
)
def test_devices_tell_the_trainers_strategy_as_it_is_seen_from_outside(options, told):
    ours = lightning(trainer=options)
    assert (ours.devices.strategy, ours.devices.count) == told
    assert ours.on(ours.devices).trainer == ours.trainer


@pytest.mark.parametrize("options", [{}, {"strategy": "ddp_spawn", "devices": 4}, {"devices": [3]}, DDP])
@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (shoal.Devices("ddp", count=4, accelerator="cpu"), {"strategy": "ddp", "devices": 4, "accelerator": "cpu"}),
        (shoal.Devices("ddp", count=2, ids=[0, 3]), {"strategy": "ddp", "devices": [0, 3], "accelerator": "auto"}),
        (
            shoal.Devices("ddp", count=4, accelerator="cuda", ids=[2, 3], precision="bf16"),
            {
                "strategy": "ddp",
                "devices": [2, 3],
                "accelerator": "cuda",
                "precision": "bf16-mixed",
                "num_nodes": 2,
            },
        ),
    ],
)
def test_devices_are_put_into_the_trainer_options(options, devices, expected):
    ours = lightning(trainer={"accelerator": "gpu"} | options).on(devices)
    assert ours.trainer == expected | ({"accelerator": "gpu"} if devices.accelerator == "cuda" else {})
    assert ours.devices == devices


def test_one_device_by_its_index_stays_one():
    ours = lightning(trainer={"accelerator": "auto"}).on(shoal.Devices(ids=[1]))
    assert ours.trainer == {"accelerator": "auto", "devices": [1]}
    assert ours.devices == shoal.Devices(ids=[1])
    assert ours.on(shoal.Devices(accelerator="cuda", ids=[1])).trainer == {"accelerator": "cuda", "devices": [1]}
    assert ours.on(shoal.Devices(accelerator="cpu")).trainer == {"accelerator": "cpu", "devices": 1}
    assert lightning(trainer=DDP).on(shoal.Devices(accelerator="cpu")).trainer == {
        "accelerator": "cpu", "strategy": "auto", "devices": 1,
    }  # fmt: skip


def test_a_strategy_that_is_an_object_stays():
    ours = lightning(trainer=FSDP)
    assert ours.on(shoal.Devices("fsdp", count=4, accelerator="cpu")).trainer == {
        "accelerator": "cpu", "strategy": FSDP["strategy"], "devices": 4,
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match="strategy 'ddp' was asked for, .* options hold a CpuFsdp"):
        ours.on(shoal.Devices("ddp", count=2, accelerator="cpu"))
    with pytest.raises(ConfigurationError, match="strategy 'dp' is not among Lightning's: use 'ddp'"):
        lightning().on(shoal.Devices("dp"))


def test_what_a_step_is_decides_the_numbers_and_not_its_devices():
    described = lightning(batch_size=8, epochs=2).describe()
    for options in (DDP, FSDP, {"strategy": "ddp_spawn", "devices": [0, 1], "num_nodes": 1}):
        assert lightning(batch_size=4, epochs=2, trainer=options).describe() == described
    assert lightning(batch_size=4, epochs=2).describe() != described
    assert lightning(batch_size=8, epochs=2, trainer={"accumulate_grad_batches": 2}).describe() != described


def test_federations_take_ranked_strategies_on_one_device_alone():
    run = partial(shoal.federate, clients=population(), rounds=1, cohort=2)
    result = run(lightning(trainer={"strategy": "ddp", "devices": 1}))
    assert_equal(result.params, run(lightning()).params, atol=1e-6)
    with pytest.raises(ConfigurationError, match="clients train on one device each, .* asks for strategy 'fsdp'"):
        run(lightning(trainer=FSDP))


def test_the_command_refuses_fsdp_without_cuda_in_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "lit.py").write_text(
        "import shoal\nfrom lightning_modules import Classifier\nfrom support import samples\n\n\n"
        "def training():\n    learner = shoal.LightningLearner(Classifier)\n"
        "    return shoal.Training(name='lit', learner=learner, data=samples(9), epochs=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["shoal", "train", "lit.py", "--strategy", "fsdp", "--devices", "1", "--accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == REFUSED
    said = capsys.readouterr().err
    assert "Lightning's FSDP needs CUDA devices: use strategy 'ddp', or a TorchLearner" in said
    assert said.count("\n") == 1


def test_it_is_quiet_unless_asked(capfd):
    ours = lightning(epochs=2)
    fit(ours)
    ours.evaluate(ours.init(0), samples(5))
    fit(ranked("ddp_fork"))
    assert capfd.readouterr() == ("", "")
    fit(lightning(trainer={"enable_model_summary": True, "enable_progress_bar": True}))
    out, err = capfd.readouterr()
    assert "Total params" in out + err


def test_the_users_callbacks_are_called_and_start_anew():
    seen = []

    class Counting(Callback):
        def __init__(self):
            self.count = 0

        def on_train_batch_end(self, *args):
            self.count += 1
            seen.append(self.count)

    ours = lightning(trainer={"callbacks": Counting()})
    fit(ours)
    fit(ours)
    assert seen == [1, 2, 3, 4, 5, 6] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stays_one(number):
    class Stop(KeyboardInterrupt):
        pass

    def stop(signum, frame):
        raise Stop

    class Interrupted(Classifier):
        def training_step(self, batch, index):
            signal.raise_signal(number)
            return super().training_step(batch, index)

    signal.signal(number, stop)  # another than Python's, as a run has that saves its state at the end
    with pytest.raises(Stop):
        fit(lightning(Interrupted))
    assert signal.getsignal(number) is stop
    fit(lightning())


def test_what_would_be_lost_in_a_child_is_refused_there():
    with pytest.raises(ConfigurationError, match="keep_optimizer=True keeps state that ends with a child process"):
        lightning(keep_optimizer=True).preload()


def test_without_the_extra_the_command_is_said():
    code = "import sys; sys.modules['lightning'] = None; import shoal; shoal.LightningLearner"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "lightning is needed to train a LightningModule and is not installed: pip install 'shoal[lightning]'" in (
        done.stderr
    )


@pytest.mark.slow
def test_programs_with_two_ranks_side_by_side(tmp_path):
    """Trainings at the same time do not meet each other, and end as one device does with twice the batch size."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    started = []
    with contextlib.ExitStack() as stack:
        for launcher, strategy in (([], "ddp_spawn"), (torchrun, "ddp")):
            folder = tmp_path / strategy
            folder.mkdir()
            words = [sys.executable, *launcher, TESTS / "lightning_modules.py", folder, strategy]
            process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    expected = fit(lightning(batch_size=8, epochs=2))
    for strategy, updates in (("ddp_spawn", 1), ("ddp", 2)):
        told = [json.loads(path.read_text()) for path in sorted((tmp_path / strategy).iterdir())]
        assert len(told) == updates
        assert all(update == told[0] for update in told)
        assert told[0]["metrics"] == pytest.approx(expected.metrics, abs=1e-6)
        delta = {name: torch.tensor(array, dtype=torch.float64) for name, array in told[0]["delta"].items()}
        assert_equal(delta, expected.delta, atol=1e-6)
