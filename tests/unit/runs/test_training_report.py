from __future__ import annotations

import json
import re
from importlib import resources

import pytest
from typer.testing import CliRunner

import shoal
from pages import CHROMIUM, figures, in_browser, width_on_a_telephone, words
from shoal.cli.main import app
from shoal.errors import RunFolderError
from shoal.runs import RunFolder, write_json, write_report
from shoal.runs.training_plots import COLOURS
from support import learner, samples

MB = 1_000_000


def record(number, *, ranks=2, **more):
    return {
        "epoch": number,
        "step": 10 * number,
        "train_loss": 1 / number,
        "train_accuracy": 1 - 0.5 / number,
        "learning_rate": 0.1 / number,
        "examples": 300,
        "seconds": 0.5,
        "samples_per_second": 600.0,
        "memory_bytes": [(100 + number + 10 * rank) * float(MB) for rank in range(ranks)],
        "utilization": 0.75,
        "loss": 2 / number,
        "accuracy": 0.9 - 0.01 * abs(number - 3),
        "elapsed": 0.6 * number,
        **more,
    }


def make_training(path, *, epochs=5, planned=None, records=None, devices=None, classes=True, **identity):
    asked = {"strategy": "ddp", "accelerator": "cpu", "precision": "fp32", **(devices or {})}
    config = {
        "identity": {"name": "sensors", "epochs": planned or epochs, "metric": None, "effective_batch": 64, **identity},
        "options": {},
        "environment": {
            "versions": {"torch": "2.13.0"},
            "devices": asked,
            "batch": {"per_device": 16, "devices": 2, "accumulate": 2},
        },
    }
    with RunFolder.open(path, config, resume=False) as folder:
        lines = records if records is not None else [record(number) for number in range(1, epochs + 1)]
        folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if classes:
            rows = [(0, 0.5, 1.0, 0.667, 1200), (1, 1.0, 0.5, 0.665, 8), (2, 0.0, 0.0, 0.0, 0)]
            names = ("label", "precision", "recall", "f1", "examples")
            write_json(folder.classes, [dict(zip(names, row, strict=True)) for row in rows])
    return path


def named(page):
    """Returns the figures by their headings."""
    titles = re.findall(r"<section class='card[^']*'><h2>([^<]*)</h2>", page.read_text())
    return dict(zip(titles, figures(page), strict=False))


def tiles(page):
    found = re.findall(r"<strong>([^<]*)</strong><span>([^<]*)</span>", page.read_text())
    return {label: value for value, label in found}


def lines(figure):
    return {trace.get("name"): (trace["x"], trace["y"]) for trace in figure["data"]}


def test_the_figures_hold_the_numbers_of_each_epoch(tmp_path):
    page = write_report([make_training(tmp_path / "run")])
    drawn = named(page)
    epochs = [1, 2, 3, 4, 5]
    assert list(drawn) == [
        "Accuracy", "Loss", "Learning rate", "Speed", "Time of an epoch", "Peak memory", "Utilization",
    ]  # fmt: skip
    assert lines(drawn["Loss"]) == {
        "training": (epochs, [1 / n for n in epochs]),
        "held out": (epochs, [2 / n for n in epochs]),
    }
    assert lines(drawn["Accuracy"])["best, epoch 3"] == ([3], [0.9])
    assert lines(drawn["Learning rate"])["run"] == (epochs, [0.1 / n for n in epochs])
    assert lines(drawn["Speed"])["run"] == (epochs, [600.0] * 5)
    assert lines(drawn["Time of an epoch"])["run"] == (epochs, [0.5] * 5)
    assert lines(drawn["Utilization"])["run"] == (epochs, [0.75] * 5)
    assert lines(drawn["Peak memory"]) == {
        "rank 0": (epochs, [(100 + n) * MB for n in epochs]),
        "rank 1": (epochs, [(110 + n) * MB for n in epochs]),
    }
    assert {figure["layout"]["xaxis"]["title"]["text"] for figure in drawn.values()} == {"epoch"}


def test_the_tiles_say_what_came_of_it_and_how_it_was_done(tmp_path):
    assert tiles(write_report([make_training(tmp_path / "run", planned=20, devices={"precision": "bf16"})])) == {
        "final accuracy": "0.8800",
        "best accuracy, epoch 3": "0.9000",
        "final loss": "0.4000",
        "training time": "2.5 s",
        "samples per second": "600",
        "epochs": "5 of 20",
        "samples trained on": "1,500",
        "batch, 16 × 2 devices × 2 accumulated": "64",
        "strategy, bf16 on cpu": "ddp",
        "peak memory, largest rank": "115 MB",
    }


def test_the_best_epoch_is_that_of_the_metric_that_was_asked_for(tmp_path):
    page = write_report([make_training(tmp_path / "run", metric="loss")])
    assert list(tiles(page))[:3] == ["final loss", "best loss, epoch 5", "final accuracy"]
    assert "best, epoch 5" in lines(named(page)["Loss"])
    assert "best, epoch 3" not in lines(named(page)["Accuracy"])


def test_nothing_is_said_of_rounds_and_clients(tmp_path):
    one = write_report([make_training(tmp_path / "one")])
    two = write_report([tmp_path / "one", make_training(tmp_path / "two", epochs=0)], tmp_path / "both.html")
    for page in (one, two):
        assert not re.search(r"round|client|global model", words(page))


def test_the_classes_stand_in_a_table_and_those_that_are_not_there_do_not_count(tmp_path):
    text = words(write_report([make_training(tmp_path / "run")]))
    assert "<th scope='row'>0</th><td>0.500</td><td>1.000</td><td>0.667</td><td>1,200</td>" in text
    assert "<th scope='row'>mean</th><td>0.750</td><td>0.750</td><td>0.666</td><td>1,208</td>" in text
    assert text.index("<h2>Utilization</h2>") < text.index("<h2>Classes</h2>") < text.index("<h2>Configuration</h2>")


def test_trainings_are_compared_epoch_by_epoch_and_class_by_class(tmp_path):
    ragged = [record(number, ranks=number) for number in (1, 2, 3)]
    runs = [make_training(tmp_path / "one"), make_training(tmp_path / "two", records=ragged, planned=7, lr=0.3)]
    rows = json.loads((tmp_path / "one" / "classes.json").read_text())
    write_json(tmp_path / "one" / "classes.json", rows[:1])
    page = write_report(runs, tmp_path / "both.html")
    drawn = named(page)
    assert [(trace["name"], len(trace["x"]), trace.get("showlegend", True)) for trace in drawn["Loss"]["data"]] == [
        ("one", 5, True), ("one, training", 5, False), ("two", 3, True), ("two, training", 3, False),
    ]  # fmt: skip
    assert lines(drawn["Peak memory"])["two"] == ([1, 2, 3], [101 * MB, 112 * MB, 123 * MB])
    text = words(page)
    assert "<th scope='row'>best accuracy</th><td>0.9000 (epoch 3)</td><td>0.9000 (epoch 3)</td>" in text
    assert "<th scope='row'>lr</th><td>–</td><td>0.3</td>" in text
    assert re.findall(r"<th scope='row'>epochs</th><td>(.*?)</td><td>(.*?)</td>", text) == [("5", "3 of 7")]
    found = re.findall(r"<th scope='row'>(\d|mean)</th><td>([^<]*)</td><td>([^<]*)</td></tr>", text)
    assert found == [("0", "0.667", "0.667"), ("1", "–", "0.665"), ("2", "–", "0.000"), ("mean", "0.667", "0.666")]


def test_a_training_beside_a_federation_is_refused_and_nothing_is_written(tmp_path):
    config = {"identity": {"name": "digits", "algorithm": {"name": "FedAvg"}}, "options": {}, "environment": {}}
    RunFolder.open(tmp_path / "federation", config, resume=False).close()
    runs = [tmp_path / "federation", make_training(tmp_path / "one", epochs=0), make_training(tmp_path / "two")]
    with pytest.raises(RunFolderError, match="one is a training and .*federation a federation.* one report of the"):
        write_report(runs, tmp_path / "all.html")
    assert not (tmp_path / "all.html").exists()


def test_a_training_without_measurements_tells_of_its_own_data(tmp_path):
    bare = [
        {key: value for key, value in record(number).items() if key not in {"loss", "accuracy", "utilization"}}
        for number in (1, 2)
    ]
    page = write_report([make_training(tmp_path / "run", records=bare, classes=False)])
    assert list(tiles(page))[:3] == ["final training accuracy", "final training loss", "training time"]
    assert list(lines(named(page)["Loss"])) == ["training"]
    assert "<p>Loss on training data while it is learned.</p>" in page.read_text()
    assert "Utilization" not in named(page)
    assert "<h2>Classes</h2>" not in page.read_text()
    # Beside one that was measured, its curve has a name of its own.
    both = write_report([tmp_path / "run", make_training(tmp_path / "other")], tmp_path / "both.html")
    shown = [trace["name"] for trace in named(both)["Loss"]["data"] if trace.get("showlegend") is not False]
    assert shown == ["run, training", "other"]


def test_epochs_without_a_number_are_left_out_and_the_last_number_is_the_final_one(tmp_path):
    gaps = [record(1), record(2, loss=None, accuracy=None, train_loss=None), record(3), record(4)]
    for name in ("loss", "accuracy"):
        del gaps[3][name]
    page = write_report([make_training(tmp_path / "run", records=gaps)])
    assert lines(named(page)["Loss"])["held out"][0] == [1, 3]
    assert lines(named(page)["Loss"])["training"][0] == [1, 3, 4]
    assert tiles(page)["final accuracy"] == "0.9000"


def test_numbers_that_are_never_finite_leave_a_page_all_the_same(tmp_path):
    broken = [record(1, loss=None, accuracy=None, train_loss=None, train_accuracy=None)]
    page = write_report([make_training(tmp_path / "run", records=broken)])
    assert [label for label in tiles(page) if "final" in label] == []
    assert not {"Loss", "Accuracy"} & named(page).keys()
    assert write_report([make_training(tmp_path / "begun", epochs=0, planned=3)]).exists()
    assert tiles(tmp_path / "begun" / "report.html")["epochs"] == "0 of 3"


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        ({"accelerator": "cuda"}, "that tensors took of each rank&#x27;s device in an epoch."),
        ({"accelerator": "cpu"}, "that each rank&#x27;s process has taken since it began."),
        ({"accelerator": "auto"}, "device in an epoch; on a CPU, that each rank&#x27;s process"),
    ],
)
def test_the_captions_say_what_memory_is_on_this_accelerator(devices, told, tmp_path):
    assert told in words(write_report([make_training(tmp_path / "run", devices=devices)]))


def test_of_several_devices_in_one_process_only_the_first_is_spoken_of(tmp_path):
    records = [record(number, ranks=1) for number in (1, 2)]
    devices = {"strategy": "dp", "accelerator": "cuda"}
    page = write_report([make_training(tmp_path / "run", records=records, devices=devices)])
    assert tiles(page)["peak memory, first device"] == "102 MB"
    assert "<p>The most that tensors took of the first device in an epoch.</p>" in page.read_text()


def test_the_page_has_the_colours_that_the_figures_count_on():
    script = (resources.files("shoal.runs") / "page" / "page.js").read_text()
    palettes = re.findall(r"(?:light|dark): \[(\"#.*?)\]", script)
    assert [len(palette.split(",")) for palette in palettes] == [COLOURS, COLOURS]


def test_many_ranks_become_a_band_and_a_few_keep_their_lines(tmp_path):
    few = write_report([make_training(tmp_path / "few", records=[record(n, ranks=8) for n in (1, 2)])])
    assert [trace["line"].get("dash") for trace in named(few)["Peak memory"]["data"]] == [None] * 6 + ["dash"] * 2
    many = write_report([make_training(tmp_path / "many", records=[record(n, ranks=65) for n in (1, 2)])])
    drawn = lines(named(many)["Peak memory"])
    assert drawn["median rank"] == ([1, 2], [421 * MB, 422 * MB])
    assert drawn["lowest to highest rank"] == ([1, 2], [101 * MB, 102 * MB])


def test_ranks_that_a_resume_has_added_begin_where_they_are(tmp_path):
    grown = [record(1, ranks=1), record(2, ranks=2), record(3, ranks=1)]
    drawn = lines(named(write_report([make_training(tmp_path / "run", records=grown)]))["Peak memory"])
    assert {name: x for name, (x, _) in drawn.items()} == {"rank 0": [1, 2, 3], "rank 1": [2]}


def test_a_short_axis_has_whole_epochs_only(tmp_path):
    short = named(write_report([make_training(tmp_path / "short", epochs=3)]))
    assert all(figure["layout"]["xaxis"]["dtick"] == 1 for figure in short.values())
    long = named(write_report([make_training(tmp_path / "long", epochs=40)]))
    assert all("dtick" not in figure["layout"]["xaxis"] for figure in long.values())


def test_a_file_by_class_that_is_none_is_refused(tmp_path):
    run = make_training(tmp_path / "run")
    write_json(run / "classes.json", {"label": 0})
    with pytest.raises(RunFolderError, match=r"classes\.json cannot be read: it holds no JSON list"):
        write_report([run])


def test_a_real_training_leaves_all_that_the_page_tells(tmp_path):
    run = tmp_path / "run"
    learning = learner(metrics={"right": lambda output, targets: (output.argmax(1) == targets).float().mean()})
    devices = shoal.Devices(accelerator="cpu", threads=1)
    result = shoal.train(learning, samples(40), epochs=3, devices=devices, evaluate=samples(20, seed=1), run_dir=run)
    shown = CliRunner().invoke(app, ["report", str(run), "--output", str(tmp_path / "page.html")])
    assert shown.exit_code == 0, shown.output
    page = tmp_path / "page.html"
    assert page.read_text() == (run / "report.html").read_text()
    assert list(named(page)) == [
        "Right", "Loss", "Learning rate", "Speed", "Time of an epoch", "Peak memory", "Utilization",
    ]  # fmt: skip
    told = tiles(page)
    assert told[f"best {result.best.metric}, epoch {result.best.epoch}"] == f"{result.best.value:.4f}"
    assert (told["epochs"], told["samples trained on"], told["batch"], told["strategy, fp32 on cpu"]) == (
        "3",
        "120",
        "4",
        "single",
    )
    assert all(f"<td>{each.f1:.3f}</td><td>{each.examples}</td>" in page.read_text() for each in result.classes)
    assert len(result.classes) == 3


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_draws_it_without_errors_and_no_wider_than_a_telephone(tmp_path):
    page = write_report([make_training(tmp_path / "run")])
    shown = in_browser(f"file://{page}#dark", tmp_path / "profile", "--window-size=1280,1000", "--dump-dom")
    assert shown.stdout.count('class="main-svg"') >= 7
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert 300 < width_on_a_telephone(page, tmp_path / "profile") <= 400
