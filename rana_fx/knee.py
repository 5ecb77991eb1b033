"""Which budget of a sweep to take, where nothing else is known: the knee of loss against cost.

In: costs over dense, and losses against the dense model. Out: the point farthest below the chord from the cheapest plan to the
dense model (cost 1, loss 0), in units of the two ranges: up to there a cheaper plan saves much for little, beyond it costs more
loss than it saves. (This is "Kneedle" without smoothing, Satopaa et al. 2011.)
"""

from __future__ import annotations

from collections.abc import Sequence


def knee(costs: Sequence[float], losses: Sequence[float]) -> int | None:
    """The index of the knee; None where no point lies below the chord, or there are fewer than two."""
    if len(costs) < 2:
        return None
    first = min(range(len(costs)), key=lambda index: (costs[index], -losses[index]))
    width, height = 1.0 - costs[first], losses[first]
    if width <= 0 or height <= 0:
        return None
    below = [(1.0 - cost) / width - loss / height for cost, loss in zip(costs, losses, strict=True)]
    best = max(range(len(costs)), key=lambda index: below[index])
    return best if below[best] > 1e-9 else None
