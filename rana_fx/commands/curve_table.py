"""``Plan.curve`` as a table: what each budget costs and loses on held-out documents."""

from __future__ import annotations

from rana_fx.commands.screen import Screen
from rana_fx.curve import Curve

AT_MOST = "(at most)"  # the upper end of the interval


def show_curve(screen: Screen, curve: Curve) -> None:
    """Print a row for each budget that was measured."""
    columns = ("budget", "flops", "bytes", "KL", AT_MOST, "loss +", AT_MOST, "ppl +", AT_MOST)
    rows = []
    for point in curve.points:
        found = [point.kl, point.loss, point.perplexity]
        ends = [end for one in found for end in ((None, None) if one is None else (one.mean, one.high))]
        rows.append((f"{point.budget:.3f}", point.flops, point.bytes, *ends))
    point = curve.points[0]
    screen.summary(
        f"on {point.documents} held-out documents ({point.tokens:,} tokens; 95 % intervals), against dense", columns, rows
    )
