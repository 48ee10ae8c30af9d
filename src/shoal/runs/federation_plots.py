"""A federation's figures: the global model, its clients, their speed, and how the data lie over them."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.runs.figures import Plot, add_band, add_line, new_figure, plain, points, series_plot
from shoal.runs.folder import RunData
from shoal.runs.metrics import held_out_metrics, number

SPREAD = ("p10", "p50", "p90")

PICTURED_SITES = 20
"""Of more, the lines could not be told apart."""

COLOURS = 6
"""How many the page has for lines."""

DASHES = ("solid", "dash", "dot", "dashdot")
"""How lines of one colour differ."""


def federation_plots(runs: Sequence[RunData]) -> list[Plot]:
    """Returns the figures of one federation, or of several laid over each other."""
    found = [_metric_plot(runs, name) for name in _metric_names(runs)]
    found += _site_plots(runs)
    found.append(series_plot(runs, "seconds", "Time of a round", "seconds"))
    found.append(series_plot(runs, "clients_per_second", "Speed", "clients per second"))
    found += [_partition_plot(run, named=len(runs) > 1) for run in runs if run.partition is not None]
    return found


def _metric_names(runs: Sequence[RunData]) -> list[str]:
    records = [record for run in runs for record in run.metrics]
    found = dict.fromkeys(name for record in records for name in held_out_metrics(record))
    if not found:  # nothing was held out: what the clients say of themselves
        prefixes = ("client_", "train_")
        keys = [key for record in records for key in record if key.startswith(prefixes) and not key.endswith(SPREAD)]
        found = dict.fromkeys(key.partition("_")[2] for key in keys)
    return list(found)


def _metric_plot(runs: Sequence[RunData], name: str) -> Plot:
    figure = new_figure("round", name)
    shown = name.replace("_", " ")
    if len(runs) > 1:
        for index, run in enumerate(runs):
            key = next((k for k in (name, f"client_{name}", f"train_{name}") if points(run, k)[0]), name)
            add_line(figure, *points(run, key), label=run.name, colour=index)
        caption = f"{shown.capitalize()} of the global model after each round, one line a run."
        return Plot(title=shown.capitalize(), caption=caption, figure=plain(figure), wide=True)
    run, told = runs[0], []
    prefix = "client" if points(run, f"client_{name}_p50")[0] else "train"
    x = points(run, f"{prefix}_{name}_p50")[0]
    if x:
        where = "validation data" if prefix == "client" else "training data"
        low, middle, high = (points(run, f"{prefix}_{name}_{part}")[1] for part in SPREAD)
        add_band(figure, x, low, middle, high, labels=("clients, p10 to p90", "median client"))
        told.append(f"the band holds the middle 80 % of the clients on their own {where}")
    if points(run, name)[0]:
        add_line(figure, *points(run, name), label="global model", colour=0)
        told.insert(0, f"{shown} of the global model on held-out data after each round")
    caption = "; ".join(told) or f"{shown} by round"
    return Plot(title=shown.capitalize(), caption=caption[0].upper() + caption[1:] + ".", figure=plain(figure))


def _site_plots(runs: Sequence[RunData]) -> list[Plot]:
    """Returns the loss of each site on its own training data; nothing where several runs would mix their sites."""
    by_site: dict[str, list[tuple[int, float]]] = {}
    for record in runs[0].metrics if len(runs) == 1 else ():
        for site, metrics in record.get("sites", {}).items():
            if metrics.get("loss") is not None:
                by_site.setdefault(site, []).append((number(record), metrics["loss"]))
    if not 0 < len(by_site) <= PICTURED_SITES:
        return []
    figure = new_figure("round", "loss")
    for index, (site, pairs) in enumerate(sorted(by_site.items())):
        dash = DASHES[index // COLOURS % len(DASHES)]
        rounds, losses = zip(*pairs, strict=True)
        add_line(figure, rounds, losses, label=site, colour=index, dash=dash)
    caption = "Loss of each site on its own training data, while it trained."
    return [Plot(title="Loss by site", caption=caption, figure=plain(figure))]


def _partition_plot(run: RunData, *, named: bool) -> Plot:
    import plotly.graph_objects as go

    picture = run.partition or {}
    counts = [list(column) for column in zip(*picture["counts"], strict=True)]
    figure = new_figure("client", "label")
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
    return Plot(title=title, caption=caption, figure=plain(figure), wide=True)
