"""Tables of rows of ``bench.quality``, complete or of an interrupted run, and ratios at equal measured budget.

In: JSONL files; of rows with the same model, text, recipe and budget the last one is used. Out: a table per model, metric and
dtype (losses in nats, budgets as fractions of dense). With ``--ratios``: the increase of the loss of recipe ``rana`` over that of
``paper``, and over the better of ``teal`` and ``wina``, at the measured budget of ``rana``. At low budgets thresholds cost less
than the target, so rows of one target budget are not comparable: log(increase) of the other recipe is interpolated linearly in
its measured budget, and extrapolated by at most 0.01. Outside of that range there is no ratio.

    python -m bench.common.table bench/results/quality-*.jsonl --ratios
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rana_fx.commands.record import show

Row = dict[str, Any]
_EXTRAPOLATION = 0.01
_RANA, _PUBLISHED, _THRESHOLDS = "rana", "paper", ("teal", "wina")


def main(
    sources: Annotated[list[Path], typer.Argument(help="JSONL files of bench.quality.")],
    ratios: Annotated[bool, typer.Option(help="Ratios of increases, rana over other recipes, at equal measured budget.")] = False,
) -> None:
    """Tables of files of bench.quality."""
    rows = read(sources)
    show_ratios(rows) if ratios else table(rows)


def read(sources: Iterable[Path]) -> list[Row]:
    """Rows of all files, the last one of each point. Raises BadParameter if there are none."""
    found: dict[tuple[Any, ...], Row] = {}
    for source in sources:
        for line in source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["bench"] != "quality":
                raise typer.BadParameter(f"{source} holds rows of bench.{row['bench']}, not of bench.quality")
            # the dense row is the same in both metrics
            metric = "" if row["recipe"] == "dense" else row["metric"]
            found[row["model"], row["dtype"], metric, row["text"], row["recipe"], row["budget"]] = row
    if not found:
        raise typer.BadParameter("the files have no rows")
    return list(found.values())


def by_figure(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(model, metric, dtype) -> its rows."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["metric"], row["dtype"]), []).append(row)
    return found


def table(rows: Sequence[Row]) -> None:
    """Print one line per text, budget and recipe."""
    columns = ("text", "recipe", "budget", "measured", "mean loss", "perplexity", "delta", "95 %", "KL", "same token")
    for (model, metric, dtype), here in by_figure(rows).items():
        found = [
            (
                row["text"],
                row["recipe"],
                row["budget"],
                "unreachable" if "unreachable" in row else row["measured"][metric],
                row.get("mean_loss"),
                row.get("perplexity"),
                row.get("delta"),
                "-" if row.get("interval") is None else "{:.4f} .. {:.4f}".format(*row["interval"]),
                row.get("kl"),
                row.get("agreement"),
            )
            for row in sorted(here, key=lambda row: (row["text"], -row["budget"], row["recipe"]))
        ]
        show(f"{model}, {dtype}, budgets in {metric}", columns, found)


def show_ratios(rows: Sequence[Row]) -> None:
    """Print one line per model, metric, text and budget of recipe rana."""
    columns = ("model", "metric", "text", "measured", _RANA, _PUBLISHED, *_THRESHOLDS, "/ paper", "/ best threshold")
    lines = []
    for (model, metric, dtype), here in by_figure(rows).items():
        for name in dict.fromkeys(row["text"] for row in here):
            lines += [(f"{model} {dtype}", metric, name, *line) for line in ratios_of(here, metric, name)]
    note = "other recipes: log(increase of the loss), interpolated linearly in measured budget at the measured budget of rana"
    show("increase of the loss at equal measured budget", columns, lines, notes=[note])


def ratios_of(rows: Sequence[Row], metric: str, text: str) -> list[tuple[float | None, ...]]:
    """(budget, increase of rana, of paper, teal, wina, ratio to paper, ratio to the better of teal and wina)."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["text"] == text and "unreachable" not in row and row["recipe"] in (_RANA, _PUBLISHED, *_THRESHOLDS):
            curves.setdefault(row["recipe"], []).append((row["measured"][metric], row["delta"]))
    found: list[tuple[float | None, ...]] = []
    for budget, ours in sorted(curves.get(_RANA, []), reverse=True):
        published, *thresholds = (interpolated(curves.get(name, []), budget) for name in (_PUBLISHED, *_THRESHOLDS))
        known = [value for value in thresholds if value is not None]
        # without both values the better one is unknown
        best = min(known) if len(known) == len(thresholds) else None
        found.append(
            (budget, ours, published, *thresholds, *(None if other is None else ours / other for other in (published, best)))
        )
    return found


def interpolated(points: Iterable[tuple[float, float]], budget: float) -> float | None:
    """Increase of the loss at a budget, log-linear between neighbouring points; None outside of the curve."""
    curve = sorted(point for point in points if point[1] > 0)  # no logarithm of an increase of zero or less
    if len(curve) < 2 or not curve[0][0] - _EXTRAPOLATION <= budget <= curve[-1][0] + _EXTRAPOLATION:
        return None
    right = next((index for index in range(1, len(curve)) if curve[index][0] >= budget), len(curve) - 1)
    (low, first), (high, second) = curve[right - 1 : right + 1]
    if high == low:
        return math.sqrt(first * second)
    share = (budget - low) / (high - low)
    return math.exp((1 - share) * math.log(first) + share * math.log(second))


if __name__ == "__main__":
    typer.run(main)
