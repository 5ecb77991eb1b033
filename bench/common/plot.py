"""Plots of rows of ``bench.quality``: increase of the loss against budget, per recipe and baseline.

In: JSONL files. Out: one PNG per model, metric and dtype, with a panel per text: increase of the mean loss over the dense model
in nats (log axis) against the budget measured on that text, with error bars for 95 % intervals where rows have them. Roundings
are single points without a line. Increases below 1e-4 nats, also negative ones, are drawn at 1e-4 with a hollow triangle.

    python -m bench.common.plot bench/results/quality-*.jsonl --out bench/results
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.common.figure import save_figure
from bench.common.table import Row, by_figure, read
from bench.quality.quantised import rounding_of

COLORS = {
    "static": "tab:gray",
    "cats": "tab:green",
    "teal": "tab:orange",
    "wina": "tab:red",
    "slicegpt": "tab:purple",
    "paper": "tab:blue",
    "rana": "black",
    "rana_alone": "dimgray",
    "neuron_ideal": "tab:cyan",
}
_FLOOR = 1e-4
_ROUNDED = {False: "tab:brown", True: "tab:cyan"}  # by Rounding.optimal
_MARKERS = "Ds^v<>pPX*hd"  # of roundings, in order of their rows


def main(
    sources: Annotated[list[Path], typer.Argument(help="JSONL files of bench.quality.")],
    out: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path("bench/results"),
) -> None:
    """Plot the increase of the loss against measured budget, from files of bench.quality."""
    for (model, metric, dtype), rows in by_figure(read(sources)).items():
        path = out / f"quality-{model}-{metric}-{dtype}.png"
        plot(rows, path)
        print(path)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write one figure with a panel per text. ``rows``: of one model, metric and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["text"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5.6 * len(names), 4.6), squeeze=False, layout="constrained")
    metric = rows[0]["metric"]
    for axis, name in zip(axes[0], names, strict=True):
        here = [row for row in rows if row["text"] == name and "unreachable" not in row and row["recipe"] != "dense"]
        markers = itertools.cycle(_MARKERS)
        for recipe in dict.fromkeys(row["recipe"] for row in here):
            points = sorted((row for row in here if row["recipe"] == recipe), key=lambda row: row["measured"][metric])
            rounding = rounding_of(recipe)
            if rounding is None:
                _draw(axis, points, metric, color=COLORS.get(recipe), marker="o", linestyle="-")
            else:
                _draw(axis, points, metric, color=_ROUNDED[rounding.optimal], marker=next(markers), linestyle="none")
        axis.set(xlabel=f"measured budget ({metric}, of dense)", ylabel="increase of mean loss, nats", title=name, yscale="log")
        axis.grid(True, which="both", alpha=0.25)
        if here:
            axis.legend(fontsize="small")
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['dtype']}")
    save_figure(figure, path)
    plt.close(figure)


def _draw(axis: Any, rows: Sequence[Row], metric: str, **style: Any) -> None:
    """Draw the points of one recipe, sorted by budget, with error bars."""
    budgets = [row["measured"][metric] for row in rows]
    heights = [max(row["delta"], _FLOOR) for row in rows]
    below, above = zip(*(_error_bar(row, height) for row, height in zip(rows, heights, strict=True)), strict=True)
    axis.errorbar(budgets, heights, yerr=(below, above), label=rows[0]["recipe"], markersize=4, capsize=2, linewidth=1.3, **style)
    under = [budget for budget, row in zip(budgets, rows, strict=True) if row["delta"] < _FLOOR]
    faint = {"markersize": 9, "markerfacecolor": "none", "color": style["color"], "linestyle": "none"}
    axis.plot(under, [_FLOOR] * len(under), marker="v", **faint)


def _error_bar(row: Row, height: float) -> tuple[float, float]:
    """Lengths of the error bar below and above a point; zero without an interval."""
    low, high = row.get("interval") or (height, height)
    return max(0.0, height - max(low, _FLOOR)), max(0.0, high - height)


if __name__ == "__main__":
    typer.run(main)
