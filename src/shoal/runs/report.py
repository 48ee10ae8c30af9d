"""The report: one HTML file that opens without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from shoal.errors import RunFolderError
from shoal.runs.files import write_atomic
from shoal.runs.folder import RunData, read_run
from shoal.runs.metrics import number, unit
from shoal.runs.plots import Plot, global_metrics, plots


def write_report(runs: Sequence[Path], target: Path | None = None) -> Path:
    """Draws a page of curves, times, partitions and configurations.

    Args:
        runs: Run folders; several are compared.
        target: The file to write; None for ``report.html`` in the only run's folder.

    Returns:
        The file's path.

    Raises:
        RunFolderError: A path is no run folder, or several runs were given and no target.
        MissingExtraError: plotly is not installed.
        StorageError: The file cannot be written.
    """
    found = [read_run(path) for path in runs]
    if target is None and len(found) != 1:
        raise RunFolderError(f"a report on {len(found)} runs needs a file to write")
    path = target or found[0].path / "report.html"
    write_atomic(path, _page(found, plots(found)))
    return path


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
        plots="\n".join(_card(index, plot) for index, plot in enumerate(figures)),
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
    tile = "<div class='tile'><strong>{}</strong><span>{}</span></div>"
    rows = (tile.format(html.escape(value), html.escape(label)) for label, value in _facts(run).items())
    failed = sum(len(record.get("failed") or ()) for record in run.metrics)
    warning = f"<p class='warning'>{failed} client updates were left out because they failed.</p>" if failed else ""
    return f"<div class='tiles'>{''.join(rows)}</div>{warning}"


def _facts(run: RunData) -> dict[str, str]:
    """Returns what one wants to know first of a run, as text by label."""
    records = run.metrics
    if not records:
        return {"rounds": "0"}
    facts: dict[str, str] = {}
    measured = [record for record in records if global_metrics(record)]
    if measured:
        first, *others = global_metrics(measured[-1])
        facts[f"final {first}"] = f"{measured[-1][first]:.4f}"
        best = _best(measured, first)
        facts[f"best {first}, {unit(best)} {number(best)}"] = f"{best[first]:.4f}"
        facts |= {f"final {name}": f"{measured[-1][name]:.4f}" for name in others[:1]}
    seconds = sum(record["seconds"] for record in records)
    if "epoch" in records[0]:
        return facts | {"epochs": f"{len(records):,}", "training time": _duration(seconds)}
    clients = sum(record["clients"] for record in records)
    facts["rounds"] = f"{len(records):,}"
    facts["client updates"] = f"{clients:,}"
    facts["training time"] = _duration(seconds)
    facts["clients per second"] = f"{clients / seconds:,.0f}" if seconds else "–"
    facts["sent down and up"] = _size(sum(record["bytes_down"] + record["bytes_up"] for record in records))
    return facts


def _best(records: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    having = [record for record in records if record.get(name) is not None]
    best_of = min if "loss" in name or "error" in name else max
    return best_of(having, key=lambda record: float(record[name]))


def _comparison(runs: Sequence[RunData]) -> str:
    columns = [_facts(run) for run in runs]
    # The round of a best value differs between runs: it belongs into the cell, not into the row's label.
    columns = [dict(_row(label, value) for label, value in column.items()) for column in columns]
    settings = [_flat(run.config.get("identity", {})) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    differing = [
        key for key in sorted({k for s in settings for k in s}) if len({str(s.get(key)) for s in settings}) > 1
    ]
    rows = [(key, [column.get(key, "–") for column in columns]) for key in keys]
    rows += [(key, [str(s.get(key, "–")) for s in settings]) for key in differing if "digest" not in key]
    head = "".join(f"<th scope='col'>{html.escape(run.name)}</th>" for run in runs)
    return f"<div class='card scroll'><table><thead><tr><td></td>{head}</tr></thead>{_table_rows(rows)}</table></div>"


def _row(label: str, value: str) -> tuple[str, str]:
    name, _, where = label.partition(", ")
    return name, f"{value} ({where})" if where else value


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
        rows = [(key, [str(value)]) for key, value in _flat(run.config.get(part, {})).items()]
        parts.append(f"<h3>{part}</h3><div class='scroll'><table>{_table_rows(rows)}</table></div>")
    title = html.escape(f"Configuration of {run.name}" if named else "Configuration")
    return f"<details class='card wide'><summary><h2>{title}</h2></summary>{''.join(parts)}</details>"


def _table_rows(rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    cells = ((key, "".join(f"<td>{html.escape(value)}</td>" for value in values)) for key, values in rows)
    return "<tbody>" + "".join(f"<tr><th scope='row'>{html.escape(k)}</th>{c}</tr>" for k, c in cells) + "</tbody>"


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {
        path: value
        for key, inner in config.items()
        for path, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for name in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {name}"
        count /= 1000
    return f"{count:.3g} TB"
