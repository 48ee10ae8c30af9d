"""The report: one HTML file that opens without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from shoal.description import flat
from shoal.errors import ConfigurationError, RunFolderError
from shoal.runs.facts import Fact, facts
from shoal.runs.federation_plots import federation_plots
from shoal.runs.figures import Plot, require_plotly
from shoal.runs.files import write_atomic
from shoal.runs.folder import RunData, read_run
from shoal.runs.tables import class_card, table
from shoal.runs.training_plots import training_plots

MAX_TILES = 8
"""As many fit side by side."""


def write_report(runs: Sequence[Path], target: Path | None = None) -> Path:
    """Draws a page of curves, times, configurations, and partitions or classes.

    Args:
        runs: Run folders, of federations or of trainings; several are compared.
        target: The file to write; None for ``report.html`` in the only run's folder.

    Returns:
        The file's path.

    Raises:
        RunFolderError: A path is no run folder, several runs were given and no target, or they cannot be compared.
        MissingExtraError: plotly is not installed.
        StorageError: The file cannot be written.
    """
    found = [read_run(path) for path in runs]
    if target is None and len(found) != 1:
        raise RunFolderError(f"a report on {len(found)} runs needs a file to write")
    _require_one_kind(found)
    require_plotly()
    path = target or found[0].path / "report.html"
    drawn = training_plots(found) if found[0].unit == "epoch" else federation_plots(found)
    write_atomic(path, _page(found, drawn))
    return path


def _require_one_kind(runs: Sequence[RunData]) -> None:
    by_unit = {run.unit: run.path for run in reversed(runs)}
    if len(by_unit) > 1:
        raise RunFolderError(
            f"{by_unit['epoch']} is a training and {by_unit['round']} a federation, whose epochs and rounds cannot be "
            "compared: make one report of the trainings and one of the federations"
        )


def report_on(run_dir: Path | None, target: str | Path | None) -> Path:
    """Draws the page of a result's own run; ``target`` as for :func:`write_report`.

    Raises:
        ConfigurationError: The run has no folder to report on.
    """
    if run_dir is None:
        raise ConfigurationError("a report is drawn from a run's folder, and this run has none: pass run_dir=…")
    return write_report([run_dir], None if target is None else Path(target))


def _page(runs: Sequence[RunData], figures: Sequence[Plot]) -> str:
    from plotly.offline import get_plotlyjs

    page = resources.files("shoal.runs") / "page"
    one = runs[0] if len(runs) == 1 else None
    title = _title(one) if one else f"{len(runs)} runs compared"
    return Template((page / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        subtitle=html.escape(_subtitle(one) if one else ", ".join(run.name for run in runs)),
        style=(page / "page.css").read_text(encoding="utf-8"),
        script=(page / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        summary=_tiles(one) if one else _comparison(runs),
        plots="\n".join([*(_card(index, plot) for index, plot in enumerate(figures)), class_card(runs)]),
        configuration="\n".join(_configuration(run, named=one is None) for run in runs),
        figures=json.dumps([plot.figure for plot in figures]).replace("<", "\\u003c"),
    )


def _title(run: RunData) -> str:
    return str(run.config.get("identity", {}).get("name") or run.name)


def _subtitle(run: RunData) -> str:
    method = run.config.get("identity", {}).get("algorithm", {}).get("name", "")
    versions = run.config.get("environment", {}).get("versions", {})
    told = [method, run.name, *(f"{name} {version}" for name, version in versions.items())]
    return " · ".join(str(part) for part in told if part)


def _tiles(run: RunData) -> str:
    told = facts(run)
    kind = "tiles" if len(told) <= MAX_TILES else "tiles two-rows"
    failed = sum(len(record.get("failed") or ()) for record in run.metrics)
    warning = f"<p class='warning'>{failed} client updates were left out because they failed.</p>" if failed else ""
    return f"<div class='{kind}'>{''.join(map(_tile, told))}</div>{warning}"


def _tile(fact: Fact) -> str:
    label = f"{fact.label}, {fact.detail}" if fact.detail else fact.label
    return f"<div class='tile'><strong>{html.escape(fact.value)}</strong><span>{html.escape(label)}</span></div>"


def _comparison(runs: Sequence[RunData]) -> str:
    columns = [{fact.label: _cell(fact) for fact in facts(run)} for run in runs]
    settings = [flat(run.config.get("identity", {})) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, [column.get(key, "–") for column in columns]) for key in keys]
    for key in sorted({key for setting in settings for key in setting} - keys.keys()):
        values = [str(setting.get(key, "–")) for setting in settings]
        if len(set(values)) > 1 and "digest" not in key:
            rows.append((key, values))
    return f"<div class='card scroll'>{table(rows, columns=[run.name for run in runs])}</div>"


def _cell(fact: Fact) -> str:
    return f"{fact.value} ({fact.detail})" if fact.detail else fact.value


def _card(index: int, plot: Plot) -> str:
    title, caption = html.escape(plot.title), html.escape(plot.caption)
    kind = "card wide" if plot.wide else "card"
    return (
        f"<section class='{kind}'><h2>{title}</h2><p>{caption}</p>"
        f"<div class='plot' id='plot-{index}' role='img' aria-label='{caption}'></div></section>"
    )


def _configuration(run: RunData, *, named: bool) -> str:
    parts = []
    for part in ("identity", "options", "environment"):
        rows = [(key, [str(value)]) for key, value in flat(run.config.get(part, {})).items()]
        parts.append(f"<h3>{part}</h3><div class='scroll'>{table(rows)}</div>")
    title = html.escape(f"Configuration of {run.name}" if named else "Configuration")
    return f"<details class='card wide'><summary><h2>{title}</h2></summary>{''.join(parts)}</details>"
