"""A training's figures: the model, the learning rate, and what it took of its devices."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.runs.facts import devices_of, leading_metric
from shoal.runs.figures import Plot, add_band, add_line, new_figure, plain, points, series_plot
from shoal.runs.folder import RunData
from shoal.runs.metrics import held_out_metrics, in_order, number
from shoal.runs.selection import best_record

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_LINES = 12
"""With more ranks than these, their lines would hide each other."""

MAX_TICKS = 12
"""So many epochs can each have their number below a figure."""

COLOURS = 6
"""How many the page has; further lines are broken ones of the same colours."""


def training_plots(runs: Sequence[RunData]) -> list[Plot]:
    """Returns the figures of one training, or of several laid over each other."""
    found = [_metric_plot(runs, name) for name in _metric_names(runs)]
    found.append(
        series_plot(
            runs,
            "learning_rate",
            "Learning rate",
            "learning rate",
            caption="The learning rate at the end of each epoch.",
            tickformat="~g",
        )
    )
    speed = "Samples per second of all devices together, epoch by epoch."
    found.append(series_plot(runs, "samples_per_second", "Speed", "samples per second", caption=speed))
    seconds = "Seconds, epoch by epoch, without the time to measure the model."
    found.append(series_plot(runs, "seconds", "Time of an epoch", "seconds", caption=seconds))
    if any(_points_of_ranks(run)[0] for run in runs):
        found.append(_memory_plot(runs))
    if _known(runs, "utilization"):
        found.append(_utilization_plot(runs))
    if all(number(record) <= MAX_TICKS for run in runs for record in run.metrics):
        for plot in found:  # plotly would number halves of epochs too
            plot.figure["layout"]["xaxis"] |= {"tick0": 1, "dtick": 1}
    if len(found) % 2:  # no hole in the page's two columns
        found[-1] = dataclasses.replace(found[-1], wide=True)
    return found


def _metric_names(runs: Sequence[RunData]) -> list[str]:
    keys = {key for run in runs for record in run.metrics for key in record}
    trained = {key.removeprefix("train_") for key in keys if key.startswith("train_") and _known(runs, key)}
    return in_order(trained.union(*(held_out_metrics(record) for run in runs for record in run.metrics)))


def _metric_plot(runs: Sequence[RunData], name: str) -> Plot:
    figure = new_figure("epoch", name)
    if len(runs) > 1:
        for index, run in enumerate(runs):
            _add_compared(figure, run, name, index)
    else:
        _add_curves(figure, runs[0], name)
    both = _known(runs, name) and _known(runs, f"train_{name}")
    where = ["training data while it is learned"] if _known(runs, f"train_{name}") else []
    where += ["held-out data after each epoch"] if _known(runs, name) else []
    lines = f"; one line a training{', dotted on its training data' if both else ''}" if len(runs) > 1 else ""
    shown = name.replace("_", " ").capitalize()
    return Plot(title=shown, caption=f"{shown} on {' and on '.join(where)}{lines}.", figure=plain(figure))


def _add_curves(figure: Figure, run: RunData, name: str) -> None:
    trained, measured = points(run, f"train_{name}"), points(run, name)
    if not measured[0]:
        add_line(figure, *trained, label="training", colour=0)
        return
    if trained[0]:
        add_line(figure, *trained, label="training", colour=1, dash="dot")
    add_line(figure, *measured, label="held out", colour=0)
    if name == leading_metric(run):
        _mark_best(figure, run, name)


def _add_compared(figure: Figure, run: RunData, name: str, colour: int) -> None:
    measured = points(run, name)
    if measured[0]:
        add_line(figure, *measured, label=run.name, colour=colour)
    trained = points(run, f"train_{name}")
    if trained[0]:
        label = f"{run.name}, training"
        add_line(figure, *trained, label=label, colour=colour, dash="dot", listed=not measured[0])


def _mark_best(figure: Figure, run: RunData, name: str) -> None:
    best = best_record(run.metrics, name) or {}
    figure.add_scatter(
        x=[number(best)],
        y=[best[name]],
        name=f"best, epoch {number(best)}",
        mode="markers",
        marker={"size": 10, "symbol": "circle"},
        hoverinfo="skip",
        meta={"role": "line", "colour": 0},
    )


def _memory_plot(runs: Sequence[RunData]) -> Plot:
    figure = new_figure("epoch", "memory")
    figure.update_yaxes(rangemode="tozero", tickformat="~s", ticksuffix="B")
    if len(runs) > 1:
        for index, run in enumerate(runs):
            x, rows = _points_of_ranks(run)
            add_line(figure, x, [max(row) for row in rows], label=run.name, colour=index)
        whose = "the fullest rank's "
    else:
        whose = _add_ranks(figure, runs[0])
    figure.update_traces(hovertemplate="%{y:.4s}B", selector={"hovertemplate": "%{y:.4g}"})
    cuda = f"that tensors took of {whose}device in an epoch"
    told = _by_accelerator(runs, cuda=cuda, cpu=f"that {whose}process has taken since it began")
    return Plot(title="Peak memory", caption=f"The most {told}.", figure=plain(figure))


def _add_ranks(figure: Figure, run: RunData) -> str:
    """Draws each rank's memory, or how it spreads over many; returns whose it is, for a caption."""
    x, rows = _points_of_ranks(run)
    ranks = max(len(row) for row in rows)
    if ranks > MAX_LINES:
        edges = [(min(row), statistics.median(row), max(row)) for row in rows]
        low, middle, high = ([edge[place] for edge in edges] for place in range(3))
        add_band(figure, x, low, middle, high, labels=("lowest to highest rank", "median rank"))
        return "each rank's "
    for rank in range(ranks):
        pairs = [(place, row[rank]) for place, row in zip(x, rows, strict=True) if rank < len(row)]
        add_line(
            figure,
            [place for place, _ in pairs],
            [value for _, value in pairs],
            label=f"rank {rank}",
            colour=rank % COLOURS,
            dash="solid" if rank < COLOURS else "dash",
        )
    figure.update_layout(showlegend=ranks > 1)
    if devices_of(run).get("strategy") == "dp":
        return "the first "
    return "each rank's " if ranks > 1 else "the "


def _points_of_ranks(run: RunData) -> tuple[list[int], list[list[float]]]:
    """Returns the epochs whose memory is known, and each one's bytes a rank; a resume may change their number."""
    pairs = [(number(record), record["memory_bytes"]) for record in run.metrics if record.get("memory_bytes")]
    return [place for place, _ in pairs], [row for _, row in pairs]


def _utilization_plot(runs: Sequence[RunData]) -> Plot:
    how = _by_accelerator(
        runs,
        cuda="the share of time in which they compute",
        cpu="the processor time of a rank, of which a core has 100 %",
    )
    caption = f"How busy the devices are on average: {how}."
    return series_plot(runs, "utilization", "Utilization", "share of time", caption=caption, tickformat=".0%")


def _by_accelerator(runs: Sequence[RunData], *, cuda: str, cpu: str) -> str:
    """Returns what holds for the accelerator that was asked for; both where that leaves it open."""
    accelerators = {devices_of(run).get("accelerator") for run in runs}
    if accelerators == {"cuda"}:
        return cuda
    return cpu if accelerators == {"cpu"} else f"{cuda}; on a CPU, {cpu}"


def _known(runs: Sequence[RunData], key: str) -> bool:
    return any(points(run, key)[0] for run in runs)
