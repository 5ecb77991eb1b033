"""The knee of a sweep: the point farthest below the chord from the cheapest plan to the dense model."""

from __future__ import annotations

import pytest

from rana_fx.knee import knee

COSTS = [0.8, 0.7, 0.6, 0.5, 0.4]


def test_the_farthest_point_below_the_chord():
    # the chord falls from .3 at .4 to 0 at 1: by .05 for .1
    assert knee(COSTS, [0.007, 0.024, 0.063, 0.152, 0.3]) == 2
    assert knee(COSTS[::-1], [0.3, 0.152, 0.063, 0.024, 0.007]) == 2
    # distances .09 - .1 = none, .15 - .1, .2 - .1 = the largest, .25 - .2
    assert knee(COSTS, [0.1, 0.1, 0.1, 0.2, 0.3]) == 2
    assert knee([0.9, 0.5], [0.0, 1.0]) == 0


@pytest.mark.parametrize(
    ("costs", "losses"),
    [
        ([], []),
        ([0.5], [0.1]),
        ([0.75, 0.5], [0.25, 0.5]),  # on the chord
        ([0.8, 0.6], [0.4, 0.5]),  # above it
        ([0.8, 0.6], [0.1, -0.1]),  # the cheapest plan loses nothing
        ([1.0, 1.0], [0.1, 0.2]),  # nothing is saved
    ],
)
def test_no_knee(costs, losses):
    assert knee(costs, losses) is None


def test_units_do_not_matter():
    losses = [0.007, 0.024, 0.063, 0.152, 0.3]
    assert knee(COSTS, [1000 * loss for loss in losses]) == knee(COSTS, losses)
