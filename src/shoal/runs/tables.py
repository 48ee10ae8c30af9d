"""The report's tables, as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shoal.runs.folder import RunData

SHARES = ("precision", "recall", "f1")


def table(rows: Iterable[tuple[str, Sequence[str]]], *, corner: str = "", columns: Sequence[str] = ()) -> str:
    """Returns a table of text.

    Args:
        rows: Each one's heading and its cells.
        corner: The heading of the rows' headings.
        columns: The cells' headings; none for a table without.
    """
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in columns)
    first = f"<th scope='col'>{html.escape(corner)}</th>" if corner else "<td></td>"
    above = f"<thead><tr>{first}{head}</tr></thead>" if columns else ""
    cells = ((key, "".join(f"<td>{html.escape(value)}</td>" for value in values)) for key, values in rows)
    body = "".join(f"<tr><th scope='row'>{html.escape(key)}</th>{told}</tr>" for key, told in cells)
    return f"<table>{above}<tbody>{body}</tbody></table>"


def class_card(runs: Sequence[RunData]) -> str:
    """Returns the table by class: of one run in full, of several the F1 scores side by side; empty without classes."""
    known = [(run.name, run.classes) for run in runs if run.classes]
    if not known:
        return ""
    if len(runs) == 1:
        title, model, columns = "Classes", "the delivered model tells", [*SHARES, "examples"]
        rows = {label: [*shares, examples] for label, shares, examples in _class_rows(known[0][1])}
    else:
        title, model, columns = "F1 by class", "each delivered model tells", [name for name, _ in known]
        found = [{label: shares[-1] for label, shares, _ in _class_rows(classes)} for _, classes in known]
        labels = dict.fromkeys(label for scores in found for label in scores)
        rows = {label: [scores.get(label, "–") for scores in found] for label in labels}
    mean = rows.pop("mean")  # to the end, also where a later run has more classes
    caption = f"How {model} the classes of the held-out data apart; the mean is over the classes that are there."
    content = table([*rows.items(), ("mean", mean)], corner="class", columns=columns)
    return f"<section class='card wide'><h2>{title}</h2><p>{caption}</p><div class='numbers'>{content}</div></section>"


def _class_rows(classes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], str]]:
    """Returns each class's label, shares and number of examples, then their mean over those with examples."""
    there = [each for each in classes if each["examples"]]
    mean = {name: sum(each[name] for each in there) / max(len(there), 1) for name in SHARES}
    mean |= {"label": "mean", "examples": sum(each["examples"] for each in there)}
    return [
        (str(each["label"]), [f"{each[name]:.3f}" for name in SHARES], f"{each['examples']:,}")
        for each in [*classes, mean]
    ]
