"""Tables and plots of the rows ``bench.quality`` wrote, also of a run that was stopped.

In: a JSONL file. Out: a table on the terminal and, where a path is given, a PNG of perplexity against the measured budget.

    python -m bench.table bench/results/quality-NAME.jsonl --png bench/results/quality-NAME.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rana_fx.commands.record import show

_COLORS = {
    "static": "tab:gray",
    "cats": "tab:green",
    "teal": "tab:orange",
    "wina": "tab:red",
    "paper": "tab:blue",
    "rana": "black",
}


def main(
    source: Annotated[Path, typer.Argument(help="JSONL file of bench.quality.")],
    png: Annotated[Path | None, typer.Option(help="Plot of perplexity against measured budget.")] = None,
) -> None:
    """Show a file of bench.quality again."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise typer.BadParameter(f"{source} has no rows")
    table(rows, rows[0]["metric"])
    if png is not None:
        plot(rows, rows[0]["metric"], png)


def table(rows: list[dict[str, Any]], metric: str) -> None:
    """One line per text, budget and recipe."""
    columns = ("text", "recipe", "budget", "measured", "mean loss", "perplexity", "delta", "KL", "same token")
    found = [
        (
            row["text"],
            row["recipe"],
            row["budget"],
            "unreachable" if "unreachable" in row else row["measured"][metric],
            row.get("mean_loss"),
            row.get("perplexity"),
            row.get("delta"),
            row.get("kl"),
            row.get("agreement"),
        )
        for row in sorted(rows, key=lambda row: (row["text"], -row["budget"], row["recipe"]))
    ]
    show(f"{rows[0]['model']}, budgets in {metric}", columns, found)


def plot(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """One panel per text, one line per recipe, the dense model as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["text"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.2), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        here = [row for row in rows if row["text"] == name and "unreachable" not in row]
        for recipe in dict.fromkeys(row["recipe"] for row in here):
            points = sorted((row["measured"][metric], float(row["perplexity"])) for row in here if row["recipe"] == recipe)
            if recipe == "dense":
                axis.axhline(points[0][1], color="black", linestyle="--", linewidth=1, label="dense")
            else:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=_COLORS.get(recipe), label=recipe)
        axis.set(xlabel=f"measured budget ({metric}, of dense)", ylabel="perplexity", title=name, yscale="log")
        axis.grid(True, which="both", alpha=0.25)
        axis.legend()
    figure.suptitle(rows[0]["model"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
