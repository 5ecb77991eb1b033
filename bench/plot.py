"""Plots of the rows ``bench.quality`` wrote: what a budget costs in loss, per recipe and rival.

In: JSONL files. Out: one PNG per model, metric and dtype, a panel per text: increase of the mean loss over dense (log axis)
against the budget measured on that text, bars for the 95 % intervals where rows have them. Roundings are points of their own,
named. What is at or below a hundredth of a thousandth of a nat, or negative, lies at the lower edge as a hollow triangle.

    python -m bench.plot bench/results/quality-*.jsonl --out bench/results
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.quantised import rounding_of
from bench.table import Row, figures, read

_COLORS = {
    "static": "tab:gray",
    "cats": "tab:green",
    "teal": "tab:orange",
    "wina": "tab:red",
    "slicegpt": "tab:purple",
    "paper": "tab:blue",
    "rana": "black",
}
_FLOOR = 1e-5
_ROUNDED = {False: "tab:brown", True: "tab:cyan"}  # by whether it is optimal


def main(
    sources: Annotated[list[Path], typer.Argument(help="JSONL files of bench.quality.")],
    out: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path("bench/results"),
) -> None:
    """Plot files of bench.quality."""
    for (model, metric, dtype), rows in figures(read(sources)).items():
        path = out / f"quality-{model}-{metric}-{dtype}.png"
        plot(rows, path)
        print(path)


def plot(rows: Sequence[Row], path: Path) -> None:
    """One panel per text. ``rows``: of one model, metric and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["text"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5.6 * len(names), 4.6), squeeze=False, layout="constrained")
    metric = rows[0]["metric"]
    for axis, name in zip(axes[0], names, strict=True):
        here = [row for row in rows if row["text"] == name and "unreachable" not in row and row["recipe"] != "dense"]
        for recipe in dict.fromkeys(row["recipe"] for row in here):
            points = sorted((row for row in here if row["recipe"] == recipe), key=lambda row: row["measured"][metric])
            _draw(axis, recipe, points, metric)
        axis.set(xlabel=f"measured budget ({metric}, of dense)", ylabel="increase of mean loss, nats", title=name, yscale="log")
        axis.grid(True, which="both", alpha=0.25)
        if here:
            axis.legend(fontsize="small")
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['dtype']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axis: Any, recipe: str, rows: Sequence[Row], metric: str) -> None:
    rounding = rounding_of(recipe)
    color = _COLORS.get(recipe) if rounding is None else _ROUNDED[rounding.optimal]
    budgets = [row["measured"][metric] for row in rows]
    heights = [max(row["delta"], _FLOOR) for row in rows]
    below, above = zip(*(_bar(row, height) for row, height in zip(rows, heights, strict=True)), strict=True)
    marker, line = ("o", "-") if rounding is None else ("D", "none")
    label = recipe if rounding is None else None
    axis.errorbar(
        budgets, heights, yerr=(below, above), color=color, label=label, marker=marker, linestyle=line, markersize=3.5, capsize=2
    )  # fmt: skip
    under = [budget for budget, row in zip(budgets, rows, strict=True) if row["delta"] <= _FLOOR]
    axis.plot(under, [_FLOOR] * len(under), marker="v", markersize=8, markerfacecolor="none", color=color, linestyle="none")
    if rounding is not None:
        axis.annotate(recipe, (budgets[0], heights[0]), xytext=(4, 3), textcoords="offset points", fontsize=7, color=color)


def _bar(row: Row, height: float) -> tuple[float, float]:
    """Lengths of a bar below and above a point; none without an interval."""
    low, high = row.get("interval") or (height, height)
    return max(0.0, height - max(low, _FLOOR)), max(0.0, high - height)


if __name__ == "__main__":
    typer.run(main)
