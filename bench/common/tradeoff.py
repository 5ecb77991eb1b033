"""The figure of the README: increase of the loss against decoding speed, for saved plans of one model.

In: rows of ``bench.decode`` with saved plans of a checkpoint, and rows of ``bench.quality`` of the same checkpoint, recipe and
budgets. Out: a PNG: on the x axis tokens per second over the dense model compiled by Inductor in the same process, on the y axis
the increase of the mean loss on held-out text with its 95 % interval, one point per budget, and the dense model at (1, 0).

    python -m bench.tradeoff bench/results/decode-NAME.jsonl bench/results/quality-NAME.jsonl --out docs/loss-against-speed.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.common.figure import save_figure

Row = dict[str, Any]


def main(
    decode: Annotated[Path, typer.Argument(help="JSONL file of bench.decode, with rows of saved plans.")],
    quality: Annotated[Path, typer.Argument(help="JSONL file of bench.quality for the same checkpoint.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("docs/loss-against-speed.png"),
    text: Annotated[str | None, typer.Option(help="Evaluation text of the losses; default: the first in the file.")] = None,
    metric: Annotated[str, typer.Option(help="Metric of the plans' budgets.")] = "flops",
) -> None:
    """Plot the increase of the loss against decoding speed."""
    points = joined(_read(decode), _read(quality), text=text, metric=metric)
    if not points:
        raise typer.BadParameter(f"no budget has a row with a saved plan in {decode} and one of recipe rana in {quality}")
    _plot(points, out)
    typer.echo(out)


def joined(decode: list[Row], quality: list[Row], *, text: str | None, metric: str) -> list[Row]:
    """One point per budget that both files have: budget, speedup, increase of the loss and its interval."""
    timed = [row for row in decode if row["kind"] == "decode" and row["batch"] == 1]
    dense = min((row["ms_per_token"]["p50"] for row in timed if row["variant_kind"] == "dense"), default=None)
    text = text or next((row["text"] for row in quality if "text" in row), None)
    # of several rows of one budget the last one is used
    losses = {
        row["budget"]: row
        for row in quality
        if row.get("recipe") == "rana" and row.get("metric") == metric and row.get("text") == text and "delta" in row
    }
    points = {
        row["budget"]: {
            "model": row["model"],
            "device": row["device"],
            "text": text,
            "budget": row["budget"],
            "speedup": dense / row["ms_per_token"]["p50"],
            "delta": losses[row["budget"]]["delta"],
            "interval": losses[row["budget"]].get("interval"),
        }
        for row in timed
        if dense is not None and row["variant_kind"] == "rana" and "plan" in row and row["budget"] in losses
    }
    return sorted(points.values(), key=lambda point: -point["budget"])


def _plot(points: list[Row], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    speeds, deltas = [point["speedup"] for point in points], [point["delta"] for point in points]
    bars = [point["interval"] or (point["delta"],) * 2 for point in points]
    below, above = zip(*((delta - low, high - delta) for delta, (low, high) in zip(deltas, bars, strict=True)), strict=True)
    axis.errorbar(speeds, deltas, yerr=(below, above), color="black", marker="o", linestyle="none", capsize=3)
    axis.plot(1.0, 0.0, color="tab:gray", marker="s")
    axis.annotate("dense, Inductor", (1.0, 0.0), textcoords="offset points", xytext=(8, 6), fontsize="small")
    for point in points:
        label = f"budget {point['budget']:g}"
        axis.annotate(label, (point["speedup"], point["delta"]), textcoords="offset points", xytext=(8, -9), fontsize="small")
    first = points[0]
    axis.set(xlabel="decoding speed over dense", ylabel=f"increase of the loss on {first['text']}, nats")
    axis.set_title(f"{first['model']}, one token at a time, {first['device']}", fontsize="medium")
    axis.grid(True, alpha=0.25)
    axis.margins(x=0.2, y=0.12)
    save_figure(figure, out)
    plt.close(figure)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


if __name__ == "__main__":
    typer.run(main)
