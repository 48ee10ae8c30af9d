"""The report's figures, without colours: the page paints them for light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.errors import MissingExtraError
from shoal.runs.folder import RunData
from shoal.runs.metrics import TIME_KEYS, UNITS, number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BOOKKEEPING = TIME_KEYS | {
    *UNITS,
    "step",
    "learning_rate",
    "memory_bytes",
    "utilization",
    "clients",
    "failed",
    "examples",
    "bytes_up",
    "bytes_down",
}
"""Keys of a record that are no metric of a model."""

SPREAD = ("p10", "p50", "p90")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure and the words around it."""

    title: str
    """Its heading."""
    caption: str
    """What it shows, in a sentence; also its label for screen readers."""
    figure: dict[str, Any]
    """Plotly's ``data`` and ``layout``."""
    wide: bool = False
    """Whether it takes the page's full width."""


def plots(runs: Sequence[RunData]) -> list[Plot]:
    """Returns the figures of one run, or of several laid over each other.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("plotly", purpose="draw a report", extra="tracking") from error
    found = [_metric_plot(runs, name) for name in _metric_names(runs)]
    found.append(_series_plot(runs, "seconds", "Time of a round", "seconds"))
    found.append(_series_plot(runs, "clients_per_second", "Speed", "clients per second"))
    found += [_partition_plot(run, named=len(runs) > 1) for run in runs if run.partition is not None]
    return found


def global_metrics(record: Mapping[str, Any]) -> list[str]:
    """Returns the names of a record's metrics of the global model, accuracy first."""
    names = [
        name
        for name, value in record.items()
        if name not in BOOKKEEPING and not name.startswith(("train_", "client_")) and isinstance(value, int | float)
    ]
    return sorted(names, key=lambda name: (name != "accuracy", name == "loss", name))


def _metric_names(runs: Sequence[RunData]) -> list[str]:
    records = [record for run in runs for record in run.metrics]
    found = dict.fromkeys(name for record in records for name in global_metrics(record))
    if not found:  # nothing was held out: what the clients say of themselves
        prefixes = ("client_", "train_")
        keys = [key for record in records for key in record if key.startswith(prefixes) and not key.endswith(SPREAD)]
        found = dict.fromkeys(key.partition("_")[2] for key in keys)
    return list(found)


def _metric_plot(runs: Sequence[RunData], name: str) -> Plot:
    figure = _figure("round", name)
    shown = name.replace("_", " ")
    if len(runs) > 1:
        for index, run in enumerate(runs):
            key = next((k for k in (name, f"client_{name}", f"train_{name}") if _points(run, k)[0]), name)
            _add_line(figure, *_points(run, key), label=run.name, colour=index)
        caption = f"{shown.capitalize()} of the global model after each round, one line a run."
        return Plot(title=shown.capitalize(), caption=caption, figure=_plain(figure), wide=True)
    run, told = runs[0], []
    prefix = "client" if _points(run, f"client_{name}_p50")[0] else "train"
    if _points(run, f"{prefix}_{name}_p50")[0]:
        where = "validation data" if prefix == "client" else "training data"
        _add_band(figure, run, f"{prefix}_{name}")
        told.append(f"the band holds the middle 80 % of the clients on their own {where}")
    if _points(run, name)[0]:
        _add_line(figure, *_points(run, name), label="global model", colour=0)
        told.insert(0, f"{shown} of the global model on held-out data after each round")
    caption = "; ".join(told) or f"{shown} by round"
    return Plot(title=shown.capitalize(), caption=caption[0].upper() + caption[1:] + ".", figure=_plain(figure))


def _series_plot(runs: Sequence[RunData], key: str, title: str, unit: str) -> Plot:
    figure = _figure("round", unit)
    for index, run in enumerate(runs):
        _add_line(figure, *_points(run, key), label=run.name, colour=index)
    figure.update_layout(showlegend=len(runs) > 1)
    figure.update_yaxes(rangemode="tozero")
    return Plot(title=title, caption=f"{unit.capitalize()}, round by round.", figure=_plain(figure))


def _partition_plot(run: RunData, *, named: bool) -> Plot:
    import plotly.graph_objects as go

    picture = run.partition or {}
    counts = [list(column) for column in zip(*picture["counts"], strict=True)]
    figure = _figure("client", "label")
    places = list(range(len(picture["clients"])))
    figure.add_trace(
        go.Heatmap(
            z=counts,
            x=places,
            y=[str(label) for label in picture["labels"]],
            customdata=[picture["clients"]] * len(counts),
            hovertemplate="client %{customdata} · label %{y}: %{z} samples<extra></extra>",
            colorbar={"title": {"text": "samples"}, "thickness": 10, "outlinewidth": 0},
            meta={"role": "heat"},
        )
    )
    ticks = places[:: max(len(places) // 8, 1)]
    figure.update_xaxes(tickvals=ticks, ticktext=[str(picture["clients"][place]) for place in ticks], showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    sizes, total, shown = picture["sizes"], picture["total_clients"], len(places)
    part = f"{shown} of {total:,} clients, evenly picked" if shown < total else f"All {total:,} clients"
    caption = (
        f"{picture['description']}. {part}; a client has {sizes['min']:,} to {sizes['max']:,} samples, "
        f"the median is {sizes['median']:,.0f}."
    )
    title = f"Partition of {run.name}" if named else "Partition"
    return Plot(title=title, caption=caption, figure=_plain(figure), wide=True)


def _figure(x: str, y: str) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=300,
        margin={"l": 56, "r": 12, "t": 12, "b": 44},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        showlegend=True,
        hovermode="x unified",
    )
    figure.update_xaxes(title={"text": x, "standoff": 8}, zeroline=False)
    figure.update_yaxes(title={"text": y.replace("_", " "), "standoff": 8}, zeroline=False, automargin=True)
    return figure


def _add_line(figure: Figure, x: list[int], y: list[float], *, label: str, colour: int) -> None:
    figure.add_scatter(
        x=x,
        y=y,
        name=label,
        mode="lines+markers" if len(x) < 2 else "lines",
        line={"width": 2.5},
        hovertemplate="%{y:.4g}",
        meta={"role": "line", "colour": colour},
    )


def _add_band(figure: Figure, run: RunData, key: str) -> None:
    x, low = _points(run, f"{key}_p10")
    _, middle = _points(run, f"{key}_p50")
    _, high = _points(run, f"{key}_p90")
    quiet = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "meta": {"role": "edge"}}
    figure.add_scatter(x=x, y=high, showlegend=False, **quiet)
    band = {**quiet, "meta": {"role": "band", "colour": 1}}
    figure.add_scatter(x=x, y=low, fill="tonexty", name="clients, p10 to p90", **band)
    figure.add_scatter(
        x=x,
        y=middle,
        name="median client",
        mode="lines",
        line={"width": 1.5, "dash": "dot"},
        hovertemplate="%{y:.4g}",
        meta={"role": "line", "colour": 1},
    )


def _points(run: RunData, key: str) -> tuple[list[int], list[float]]:
    """Returns the rounds or epochs that have a number under a key, and the numbers."""
    pairs = [(number(record), record[key]) for record in run.metrics if record.get(key) is not None]
    return [place for place, _ in pairs], [value for _, value in pairs]


def _plain(figure: Figure) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(figure.to_json())
    return plain
