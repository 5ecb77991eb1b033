"""Tables of the rows ``bench.quality`` wrote, also of a run that was stopped, and ratios at equal cost.

In: JSONL files; where two rows are of the same model, text, recipe and budget the later one counts. Out: a table per model,
metric and dtype, and with ``--ratios`` the increase of the loss of recipe ``rana`` over that of ``paper`` and over the better of
``teal`` and ``wina`` AT THE BUDGET THAT ``rana`` WAS MEASURED AT. Thresholds spend less than asked at low budgets, so rows of one
asked budget are no fair pair: the rival's log(increase) is interpolated linearly in its measured budget, and continued by at
most 0.01 beyond its ends. Where its curve does not reach there is no ratio.

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
_BEYOND = 0.01
_OURS, _PUBLISHED, _THRESHOLDS = "rana", "paper", ("teal", "wina")


def main(
    sources: Annotated[list[Path], typer.Argument(help="JSONL files of bench.quality.")],
    ratios: Annotated[bool, typer.Option(help="Increases of recipe rana over others' at equal measured budget.")] = False,
) -> None:
    """Show files of bench.quality again."""
    rows = read(sources)
    show_ratios(rows) if ratios else table(rows)


def read(sources: Iterable[Path]) -> list[Row]:
    """Rows of all files, each point once. Raises BadParameter where there are none."""
    found: dict[tuple[Any, ...], Row] = {}
    for source in sources:
        for line in source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["bench"] != "quality":
                raise typer.BadParameter(f"{source} holds rows of bench.{row['bench']}, not of bench.quality")
            # the dense row costs all of either metric
            metric = "" if row["recipe"] == "dense" else row["metric"]
            found[row["model"], row["dtype"], metric, row["text"], row["recipe"], row["budget"]] = row
    if not found:
        raise typer.BadParameter("the files have no rows")
    return list(found.values())


def figures(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(model, metric, dtype) -> its rows."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["metric"], row["dtype"]), []).append(row)
    return found


def table(rows: Sequence[Row]) -> None:
    """One line per text, budget and recipe."""
    columns = ("text", "recipe", "budget", "measured", "mean loss", "perplexity", "delta", "95 %", "KL", "same token")
    for (model, metric, dtype), here in figures(rows).items():
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
    """One line per model, metric, text and budget of recipe rana."""
    columns = ("model", "metric", "text", "measured", _OURS, _PUBLISHED, *_THRESHOLDS, "/ paper", "/ best threshold")
    lines = []
    for (model, metric, dtype), here in figures(rows).items():
        for name in dict.fromkeys(row["text"] for row in here):
            lines += [(f"{model} {dtype}", metric, name, *line) for line in ratios_of(here, metric, name)]
    note = "rivals: log(increase of the loss) interpolated linearly in measured budget, to the budget rana was measured at"
    show("increase of the loss at equal measured budget", columns, lines, notes=[note])


def ratios_of(rows: Sequence[Row], metric: str, text: str) -> list[tuple[float | None, ...]]:
    """(budget, increase of rana, of paper, teal, wina, ratio to paper, ratio to the better of teal and wina)."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["text"] == text and "unreachable" not in row and row["recipe"] in (_OURS, _PUBLISHED, *_THRESHOLDS):
            curves.setdefault(row["recipe"], []).append((row["measured"][metric], row["delta"]))
    found: list[tuple[float | None, ...]] = []
    for budget, ours in sorted(curves.get(_OURS, []), reverse=True):
        published, *thresholds = (at(curves.get(name, []), budget) for name in (_PUBLISHED, *_THRESHOLDS))
        there = [value for value in thresholds if value is not None]
        # with one of the two missing, "the better of them" would not be known
        best = min(there) if len(there) == len(thresholds) else None
        found.append(
            (budget, ours, published, *thresholds, *(None if rival is None else ours / rival for rival in (published, best)))
        )
    return found


def at(points: Iterable[tuple[float, float]], budget: float) -> float | None:
    """Increase of the loss at a budget: log-linear between neighbours; None where there are none."""
    curve = sorted(point for point in points if point[1] > 0)  # an increase that is none has no logarithm
    if len(curve) < 2 or not curve[0][0] - _BEYOND <= budget <= curve[-1][0] + _BEYOND:
        return None
    right = next((index for index in range(1, len(curve)) if curve[index][0] >= budget), len(curve) - 1)
    (low, first), (high, second) = curve[right - 1 : right + 1]
    if high == low:
        return math.sqrt(first * second)
    share = (budget - low) / (high - low)
    return math.exp((1 - share) * math.log(first) + share * math.log(second))


if __name__ == "__main__":
    typer.run(main)
