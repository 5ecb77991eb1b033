"""The curve of ``rana-fx sweep`` as a PNG: loss increase against expected cost and, on a GPU, against the expected time.

In: points, their times and the knee. Out: a file, written atomically. matplotlib is an extra.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rana_fx.atomic import replacing
from rana_fx.curve import CurvePoint, Interval

HINT = "no figure: matplotlib is not installed; pip install 'rana-fx[plot]'"


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(
    path: Path,
    title: str,
    metric: str,
    rows: Sequence[tuple[CurvePoint, Interval]],
    *,
    what: str,
    best: int | None,
    times: tuple[Sequence[float], float] | None,
) -> None:
    """Write the figure.

    Args:
        rows: points with the measurement to draw, called ``what``. best: the index of the knee.
        times: ms of a token by point, and of the dense model; None: only one panel, over cost.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, list[float], float]] = [
        (f"expected {metric} of the linears, over dense", [getattr(point, metric) for point, _ in rows], 1.0)
    ]
    if times is not None:
        panels.append(("expected ms a decoded token", list(times[0]), times[1]))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.4), squeeze=False, layout="constrained")
    for axis, (label, places, dense) in zip(axes[0], panels, strict=True):
        _draw(axis, places, [found for _, found in rows], dense, best)
        axis.set(xlabel=label, ylabel=what)
        for place, (point, found) in zip(places, rows, strict=True):
            axis.annotate(f"{point.budget:g}", (place, found.mean), xytext=(5, 5), textcoords="offset points", fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def _draw(axis: Any, places: Sequence[float], found: Sequence[Interval], dense: float, best: int | None) -> None:
    means = [one.mean for one in found]
    errors = ([one.mean - one.low for one in found], [one.high - one.mean for one in found])
    axis.errorbar(places, means, yerr=errors, marker="o", color="black", capsize=2, linewidth=1.3, label="plans, 95 % intervals")
    axis.plot([dense], [0], marker="s", color="tab:gray", linestyle="none", label="dense")
    if best is not None:
        axis.plot([places[best]], [means[best]], marker="o", markersize=13, fillstyle="none", color="tab:red", label="knee")
    axis.grid(True, alpha=0.25)
    axis.legend(fontsize="small")
