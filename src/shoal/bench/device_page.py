"""The figures of ``shoal bench devices``: one HTML page that opens without a network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.bench.devices import DeviceTables, Row
from shoal.errors import ConfigurationError, MissingExtraError
from shoal.runs.files import write_atomic

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><link rel="icon" href="data:,"><title>{title}</title>
<style>body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}</style>
</head>
<body>
<h1>{title}</h1>
<p>{subtitle}</p>
{figures}
</body>
</html>
"""


def check_page(path: Path) -> None:
    """Makes sure that a page can be drawn, before anything is measured for it.

    Raises:
        ConfigurationError: The file's name does not end in ``.html``.
        MissingExtraError: plotly is not installed.
    """
    if path.suffix != ".html":
        raise ConfigurationError(f"--plot draws an HTML page: give it a name such as {path.with_suffix('.html')}")
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("plotly", purpose="draw the figures", extra="tracking") from error


def write_page(tables: DeviceTables, path: Path) -> None:
    """Draws throughput, memory, times and the sweep.

    Raises:
        StorageError: The file cannot be written.
    """
    from plotly.io import to_html

    figures = [_throughput(tables.configurations), _parts(tables.configurations), _memory(tables.configurations)]
    figures += [_precisions(tables.precisions), _sweep(tables.sweep)]
    drawn = (
        to_html(figure, full_html=False, include_plotlyjs=number == 0, config={"displayModeBar": False})
        for number, figure in enumerate(figures)
    )
    title = f"{tables.model} on the devices of this machine"
    page = PAGE.format(title=html.escape(title), subtitle=html.escape(tables.device), figures="\n".join(drawn))
    write_atomic(path, page)


def name(row: Row) -> str:
    """Returns what a configuration is called in tables and figures."""
    return row.case.strategy if row.case.strategy == "single" else f"{row.case.strategy} × {row.case.count}"


def _throughput(rows: Sequence[Row]) -> Figure:
    figure = _figure("Throughput", "samples/s of all devices")
    found = [(name(row), row.speed.samples_per_second) for row in rows if row.speed]
    figure.add_bar(x=[x for x, _ in found], y=[y for _, y in found], hovertemplate="%{y:,.0f}<extra></extra>")
    return figure


def _parts(rows: Sequence[Row]) -> Figure:
    figure = _figure("Forward and backward of a step, with standard deviation", "ms")
    for part in ("forward", "backward"):
        found = [(name(row), times) for row in rows if row.speed and (times := getattr(row.speed, part))]
        spread = {"type": "data", "array": [times.sd for _, times in found]}
        figure.add_bar(x=[x for x, _ in found], y=[times.mean for _, times in found], error_y=spread, name=part)
    return figure


def _memory(rows: Sequence[Row]) -> Figure:
    figure = _figure("Peak memory, device by device", "MiB")
    most = max((len(row.speed.peak_bytes) for row in rows if row.speed), default=0)
    for device in range(most):
        found = [
            (name(row), row.speed.peak_bytes[device] / 2**20)
            for row in rows
            if row.speed and device < len(row.speed.peak_bytes)
        ]
        figure.add_bar(x=[x for x, _ in found], y=[y for _, y in found], name=f"device {device}")
    return figure


def _precisions(rows: Sequence[Row]) -> Figure:
    figure = _figure("Precision, on one device", "samples/s")
    found = [(row.case.precision, row.speed.samples_per_second) for row in rows if row.speed]
    figure.add_bar(x=[x for x, _ in found], y=[y for _, y in found], hovertemplate="%{y:,.0f}<extra></extra>")
    return figure


def _sweep(rows: Sequence[Row]) -> Figure:
    figure = _figure("Batch size, on one device", "samples/s")
    found = [(row.case.batch_size, row.speed.samples_per_second) for row in rows if row.speed]
    figure.add_scatter(x=[x for x, _ in found], y=[y for _, y in found], mode="lines+markers")
    figure.update_xaxes(type="log", title="samples in a batch", tickvals=[x for x, _ in found])
    return figure


def _figure(title: str, unit: str) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(template="simple_white", title=title, height=360, barmode="group")
    figure.update_yaxes(title=unit, rangemode="tozero")
    return figure
