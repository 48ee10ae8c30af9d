"""What the report's figures are made of, without colours: the page paints them for light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.errors import MissingExtraError
from shoal.runs.folder import RunData
from shoal.runs.metrics import number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


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


def require_plotly() -> None:
    """Does nothing where figures can be drawn.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("plotly", purpose="draw a report", extra="tracking") from error


def series_plot(
    runs: Sequence[RunData],
    key: str,
    title: str,
    quantity: str,
    *,
    caption: str | None = None,
    tickformat: str | None = None,
) -> Plot:
    """Returns one quantity of each round or epoch, one line a run.

    Args:
        runs: All of rounds, or all of epochs.
        key: The quantity's key in the records.
        title: The figure's heading.
        quantity: Its name or unit.
        caption: The figure's; None names the quantity.
        tickformat: How plotly writes its values, in d3's language; None leaves it to plotly.
    """
    unit = runs[0].unit
    figure = new_figure(unit, quantity)
    for index, run in enumerate(runs):
        add_line(figure, *points(run, key), label=run.name, colour=index)
    figure.update_layout(showlegend=len(runs) > 1)
    figure.update_yaxes(rangemode="tozero", tickformat=tickformat)
    if tickformat is not None:
        figure.update_traces(hovertemplate=f"%{{y:{tickformat}}}")
    told = caption or f"{quantity.capitalize()}, {unit} by {unit}."
    return Plot(title=title, caption=told, figure=plain(figure))


def new_figure(x: str, y: str) -> Figure:
    """Returns a figure with nothing in it.

    Args:
        x: The name of the horizontal axis.
        y: The name of the vertical one; underscores become spaces.
    """
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


def add_line(
    figure: Figure,
    x: Sequence[int],
    y: Sequence[float],
    *,
    label: str,
    colour: int,
    dash: str = "solid",
    listed: bool = True,
) -> None:
    """Draws a line; a single point as a marker, because a line of one point is invisible.

    Args:
        figure: What to draw into.
        x: Rounds or epochs.
        y: As many values.
        label: Names the line.
        colour: Which of the page's colours it has.
        dash: Plotly's name of how it is broken; what is broken is also thinner.
        listed: Whether it has a place in the legend.
    """
    figure.add_scatter(
        x=x,
        y=y,
        name=label,
        mode="lines+markers" if len(x) < 2 else "lines",
        line={"width": 2.5} if dash == "solid" else {"width": 1.5, "dash": dash},
        hovertemplate="%{y:.4g}",
        meta={"role": "line", "colour": colour},
        **({} if listed else {"showlegend": False}),
    )


def add_band(
    figure: Figure,
    x: Sequence[int],
    low: Sequence[float],
    middle: Sequence[float],
    high: Sequence[float],
    *,
    labels: tuple[str, str],
) -> None:
    """Fills the space between two lines, with a dotted line within.

    Args:
        figure: What to draw into.
        x: Rounds or epochs.
        low: The lower edge.
        middle: The dotted line.
        high: The upper edge.
        labels: Of the band, and of the line.
    """
    quiet = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "meta": {"role": "edge"}}
    figure.add_scatter(x=x, y=high, showlegend=False, **quiet)
    band = {**quiet, "meta": {"role": "band", "colour": 1}}
    figure.add_scatter(x=x, y=low, fill="tonexty", name=labels[0], **band)
    figure.add_scatter(
        x=x,
        y=middle,
        name=labels[1],
        mode="lines",
        line={"width": 1.5, "dash": "dot"},
        hovertemplate="%{y:.4g}",
        meta={"role": "line", "colour": 1},
    )


def points(run: RunData, key: str) -> tuple[list[int], list[float]]:
    """Returns the rounds or epochs that have a number under a key, and the numbers."""
    pairs = [(number(record), record[key]) for record in run.metrics if record.get(key) is not None]
    return [place for place, _ in pairs], [value for _, value in pairs]


def plain(figure: Figure) -> dict[str, Any]:
    """Returns a figure as JSON."""
    told: dict[str, Any] = json.loads(figure.to_json())
    return told
