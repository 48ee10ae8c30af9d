from __future__ import annotations

import json
import re
import sys

import pytest

from pages import CHROMIUM, figures, in_browser, width_on_a_telephone
from shoal.errors import MissingExtraError, RunFolderError
from shoal.runs import RunFolder, read_run, write_json, write_report


def record(number, **more):
    accuracy = 1 - 0.8 / number
    return {
        "round": number,
        "clients": 9,
        "failed": [],
        "examples": 120,
        "train_loss": 2 / number,
        "train_loss_p10": 1 / number,
        "train_loss_p50": 2 / number,
        "train_loss_p90": 3 / number,
        "bytes_down": 1000,
        "bytes_up": 900,
        "seconds": 0.5,
        "clients_per_second": 18.0,
        "elapsed": 0.5 * number,
        "loss": 2 / number,
        "accuracy": accuracy,
        **more,
    }


def make_run(path, *, rounds=5, alpha=0.3, name="digits", classes=True, **more):
    config = {
        "identity": {"name": name, "algorithm": {"name": "FedAvg"}, "clients": {"alpha": alpha, "digest": str(alpha)}},
        "options": {"rounds": rounds},
        "environment": {"versions": {"torch": "2.13.0"}},
    }
    with RunFolder.open(path, config, resume=False) as folder:
        lines = [json.dumps(record(number, **more)) for number in range(1, rounds + 1)]
        folder.metrics.write_text("".join(line + "\n" for line in lines))
        picture = {
            "clients": [0, 1, 2],
            "labels": [0, 1],
            "counts": [[5, 0], [2, 2], [0, 7]],
            "sizes": {"min": 4, "median": 5.0, "max": 7},
            "total_clients": 3,
            "description": "Dirichlet(alpha=0.3)",
        }
        if classes:
            write_json(folder.partition, picture)
    return path


def test_a_page_holds_the_runs_numbers(tmp_path):
    page = write_report([make_run(tmp_path / "run")])
    assert page == tmp_path / "run" / "report.html"
    accuracy, loss, seconds, speed, partition = figures(page)
    assert accuracy["data"][-1]["y"] == pytest.approx([1 - 0.8 / n for n in range(1, 6)])
    assert [trace["name"] for trace in loss["data"] if trace.get("showlegend") is not False] == [
        "clients, p10 to p90", "median client", "global model",
    ]  # fmt: skip
    assert seconds["data"][0]["y"] == [0.5] * 5
    assert speed["data"][0]["y"] == [18.0] * 5
    assert partition["data"][0]["z"] == [[5, 2, 0], [0, 2, 7]]
    text = page.read_text()
    for fact in ("<strong>0.8400</strong><span>final accuracy</span>", "<strong>45</strong><span>client updates</span>",
                 "Dirichlet(alpha=0.3). All 3 clients; a client has 4 to 7 samples"):  # fmt: skip
        assert fact in text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = write_report([make_run(tmp_path / "run")]).read_text()
    addresses = re.findall(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?([^"' >]+)""", text)
    assert [address for address in addresses if not address.startswith("data:")] == []
    assert "@import" not in text.partition("<script>")[0]


def test_several_runs_lie_over_each_other_and_their_difference_is_named(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", alpha=9.0, rounds=7, classes=False)]
    page = write_report(runs, tmp_path / "both.html")
    accuracy = figures(page)[0]
    assert [(trace["name"], len(trace["x"])) for trace in accuracy["data"]] == [("one", 5), ("two", 7)]
    text = page.read_text()
    assert re.search(r"<th scope='row'>clients.alpha</th><td>0.3</td><td>9.0</td>", text)
    assert "clients.digest</th><td>0.3</td><td>9.0" not in text
    with pytest.raises(RunFolderError, match="2 runs needs a file"):
        write_report(runs)


def test_gaps_failures_and_other_metrics(tmp_path):
    run = make_run(tmp_path / "run", failed=[3, 4], f1=0.5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    del lines[1]["accuracy"]
    lines[2]["loss"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([run])
    accuracy, f1, loss, *_ = figures(page)
    assert accuracy["data"][-1]["x"] == [1, 3, 4, 5]
    assert f1["data"][-1]["y"] == [0.5] * 5
    assert loss["data"][-1]["x"] == [1, 2, 4, 5]
    assert "10 client updates were left out because they failed" in page.read_text()


def test_each_site_has_a_line_and_a_second_run_none(tmp_path):
    losses = {"site-1": [0.5, 0.25], "site-2": [1.0, None]}
    run = make_run(tmp_path / "run", rounds=0)
    for place in (0, 1):
        sites = {site: {"loss": values[place]} for site, values in losses.items()}
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(record(place + 1, sites=sites)) + "\n")
    page = write_report([run])
    assert "Loss by site" in page.read_text()
    found = [figure["data"] for figure in figures(page)]
    lines = next(data for data in found if data and data[0].get("name") == "site-1")
    assert [(line["name"], line["x"], line["y"]) for line in lines] == [
        ("site-1", [1, 2], [0.5, 0.25]),
        ("site-2", [1], [1.0]),
    ]
    both = write_report([run, make_run(tmp_path / "other", rounds=2)], tmp_path / "both.html")
    assert "Loss by site" not in both.read_text()


def test_names_are_text_and_never_markup(tmp_path):
    evil = "</script><script>alert(1)</script>"
    run = make_run(tmp_path / "run", name=evil)
    (run / "config.json").write_text(
        (run / "config.json").read_text().replace("FedAvg", "<img src=x onerror=alert(2)>")
    )
    picture = json.loads((run / "partition.json").read_text())
    write_json(run / "partition.json", picture | {"labels": [evil, 1]})
    text = write_report([run]).read_text()
    assert "<script>alert(1)" not in text
    assert "<img src=x" not in text
    assert text.count("<script") == 3 + text.count('"<script')


def test_a_run_without_rounds_still_has_a_page(tmp_path):
    run = make_run(tmp_path / "run", rounds=1)
    (run / "metrics.jsonl").write_text("")
    assert "<h1>digits</h1>" in write_report([run]).read_text()
    assert read_run(run).metrics == []


def test_without_the_library_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'shoal\[tracking\]'"):
        write_report([make_run(tmp_path / "run")])
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_it_without_errors(theme, tmp_path):
    page = write_report([make_run(tmp_path / "run")])
    shown = in_browser(f"file://{page}#{theme}", tmp_path / "profile", "--window-size=1280,1000", "--dump-dom")
    dom = shown.stdout
    assert f'data-theme="{theme}"' in dom
    assert dom.count('class="main-svg"') >= 5
    assert dom.count('class="heatmaplayer') >= 1
    assert re.search(r'class="hm"', dom)
    assert "CONSOLE" not in shown.stderr, shown.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_nothing_is_wider_than_a_telephone(tmp_path):
    write_report(
        [make_run(tmp_path / name, name="x" * 70) for name in ("one", "two-with-a-rather-long-name")],
        tmp_path / "r.html",
    )
    assert 300 < width_on_a_telephone(tmp_path / "r.html", tmp_path / "profile") <= 400
