"""``Plan.curve`` as a table: what each budget costs and loses on held-out documents."""

from __future__ import annotations

from rana_fx.commands.record import show
from rana_fx.curve import PROMISES, Curve


def show_curve(curve: Curve) -> None:
    """Print a row for each budget that was measured."""
    columns = ("budget", "flops", "bytes", "KL", "loss +", "perplexity +")
    rows = [
        (f"{point.budget:.3f}", point.flops, point.bytes, *(getattr(point, name) for name, _ in PROMISES.values()))
        for point in curve.points
    ]
    point = curve.points[0]
    title = f"against the dense model, on {point.documents} held-out documents ({point.tokens:,} tokens; 95 % intervals)"
    show(title, columns, rows)
