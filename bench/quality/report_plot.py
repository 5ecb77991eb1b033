"""The figure of ``bench.reproduce``: loss before and after training, errors of MLP outputs, components needed, tokens/s.

In: rows of one model. Out: one PNG with a panel for each stage that has rows; no file without rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.common.figure import save_figure
from bench.common.plot import COLORS
from bench.common.result_store import Row, latest

_FLOOR = 1e-4  # smallest height on a logarithmic axis


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Write the figure; False if no stage has rows."""
    panels: dict[str, Callable[[Any, list[Row]], None]] = {
        "quality": _quality, "finetune": _finetune, "mlp": _mlp, "ranks": _ranks, "latency": _latency,
    }  # fmt: skip
    found = {stage: [row for row in rows if row["stage"] == stage] for stage in panels}
    stages = [stage for stage, here in found.items() if here]
    if not stages:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = min(3, len(stages))
    high = -(-len(stages) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(5.4 * wide, 4.4 * high), squeeze=False, layout="constrained")
    for axis in axes.flat[len(stages) :]:
        axis.set_axis_off()
    for axis, stage in zip(axes.flat, stages, strict=False):
        panels[stage](axis, found[stage])
        axis.grid(True, which="both", alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.suptitle(", ".join(dict.fromkeys(row["model"] for row in rows)))
    save_figure(figure, path, dpi=120)
    plt.close(figure)
    return True


def _quality(axis: Any, rows: list[Row]) -> None:
    text = rows[0]["text"]
    here = [row for row in latest(rows, "text", "recipe", "budget").values() if row["text"] == text and "delta" in row]
    metric = rows[0]["metric"]
    _curves(axis, [(row["recipe"], row["measured"][metric], row["delta"]) for row in here if row["recipe"] != "dense"])
    axis.set(title=f"before training, {text}", ylabel="increase of mean loss, nats", yscale="log", xlabel=_measured(metric))


def reference(rows: Sequence[Row], row: Row) -> Row | None:
    """The row of the dense model trained with the same settings (text, tokens, method, rate, ...); None if there is none."""
    same = [other for other in rows if other["recipe"] == "dense" and other.get("trained_as") == row.get("trained_as")]
    return same[-1] if same and "results" in same[-1] else None


def _finetune(axis: Any, rows: list[Row]) -> None:
    metric = rows[0]["metric"]
    found = [row for row in latest(rows, "recipe", "budget").values() if "results" in row and row["recipe"] != "dense"]
    pairs = [(row, dense) for row in found if (dense := reference(rows, row)) is not None]
    if pairs:
        text = next(iter(pairs[0][0]["results"]))
        for when, style in (("after", {}), ("before", {"label": "{} untrained", "linestyle": ":", "alpha": 0.6})):
            points = [(row["recipe"], row["results"][text][when], dense["results"][text][when]) for row, dense in pairs]
            lines = [(name, ours["measured"][metric], ours["mean_loss"] - base["mean_loss"]) for name, ours, base in points]
            _curves(axis, lines, **style)
        axis.set(title=f"after training, {text}", yscale="log")
    axis.set(ylabel="increase over the trained dense model, nats", xlabel=_measured(metric))


def _mlp(axis: Any, rows: list[Row]) -> None:
    here = [row for row in latest(rows, "recipe", "budget").values() if "error" in row]
    _curves(axis, [(row["recipe"], row["measured"], row["error"]) for row in here])
    axis.set(title="MLP outputs", ylabel="relative squared error", yscale="log", xlabel="measured budget of the MLP")


def _ranks(axis: Any, rows: list[Row]) -> None:
    groups: dict[str, dict[float, list[Row]]] = {}
    for need in rows[-1]["needs"]:
        groups.setdefault(f"{need['role']}\n{need['basis']}s", {}).setdefault(need["energy"], []).append(need)
    shares = sorted({share for found in groups.values() for share in found})
    for index, share in enumerate(shares):
        means = [
            sum(need["mean"] for need in found.get(share, [])) / max(1, len(found.get(share, []))) for found in groups.values()
        ]
        places = [place + (index - (len(shares) - 1) / 2) * 0.35 for place in range(len(groups))]
        axis.bar(places, means, width=0.33, label=f"{share:.0%} of a token's energy")
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set(title="components that an input needs", ylabel="fraction")


def _latency(axis: Any, rows: list[Row]) -> None:
    points = rows[-1]["points"]
    decoded = [row for row in rows[-1]["rows"] if row["kind"] == "decode" and row["batch"] == 1]
    plans: list[tuple[str, float, float]] = []
    for row in decoded:
        point = points.get(row.get("plan"))
        if point is None:
            axis.axhline(row["tokens_per_s"], linestyle="--", linewidth=1, color="tab:gray")
            axis.annotate(row["variant"], (0.02, row["tokens_per_s"]), xycoords=("axes fraction", "data"), fontsize="small")
        else:
            plans.append((point[0], point[1], row["tokens_per_s"]))
    _curves(axis, plans)
    axis.set(title="decoding, batch 1", ylabel="tokens/s", xlabel="target budget")


def _curves(axis: Any, points: Sequence[tuple[str, float, float]], *, label: str = "{}", **style: Any) -> None:
    """One curve per recipe through (budget, height)."""
    for recipe in dict.fromkeys(name for name, _, _ in points):
        line = sorted((budget, max(height, _FLOOR)) for name, budget, height in points if name == recipe)
        look = {"marker": "o", "markersize": 4, "linewidth": 1.3, "linestyle": "-"} | style
        axis.plot(*zip(*line, strict=True), label=label.format(recipe), color=COLORS.get(recipe), **look)


def _measured(metric: str) -> str:
    return f"measured budget ({metric}, of dense)"
