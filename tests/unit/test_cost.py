"""Cost is a vector of two metrics; Kept takes missing values from the expected ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.cost import METRICS, Cost, Kept
from rana_fx.errors import UnknownMetric

# whole numbers below 2^20: sums and products of a few are exact in a double
NUMBERS = st.integers(-(2**20), 2**20).map(float)
COSTS = st.builds(Cost, NUMBERS, NUMBERS)


@given(COSTS, COSTS, COSTS, NUMBERS)
def test_costs_are_vectors(a, b, c, factor):
    assert a + b == b + a and (a + b) + c == a + (b + c) and a + Cost() == a
    assert (a + b) - b == a and a - a == Cost()
    assert factor * (a + b) == a * factor + b * factor
    assert sum([a, b, c], Cost()) == a + b + c


@given(COSTS, COSTS, NUMBERS)
def test_metrics_do_not_mix(a, b, factor):
    assert (a.flops, a.bytes) == tuple(a[metric] for metric in METRICS)
    for metric in METRICS:
        assert (a + b)[metric] == a[metric] + b[metric]
        assert (a - b)[metric] == a[metric] - b[metric]
        assert (a * factor)[metric] == a[metric] * factor


def test_over_is_a_fraction_in_each_metric():
    assert Cost(1.0, 6.0).over(Cost(4.0, 8.0)) == Cost(0.25, 0.75)


def test_an_unknown_metric_is_refused():
    with pytest.raises(UnknownMetric, match="metric='latency' is not known. Pick one of: flops, bytes"):
        Cost(1.0, 2.0)["latency"]


@given(*[st.one_of(st.none(), st.floats(0, 9)) for _ in range(6)])
def test_what_is_given_wins(ranks, inputs, outputs, ranks2, inputs2, outputs2):
    got = Kept(ranks, inputs, outputs).otherwise(Kept(ranks2, inputs2, outputs2))
    pairs = [(got.ranks, ranks, ranks2), (got.inputs, inputs, inputs2), (got.outputs, outputs, outputs2)]
    assert all(one == (second if first is None else first) for one, first, second in pairs)


def test_means_by_name_meet_in_one_kept():
    got = Kept.by_name({"a": 2.0, "b": Kept(3.0, outputs=1.0)}, {"b": 4.0}, {"b": 9.0, "c": 5.0})
    assert got == {"a": Kept(2.0), "b": Kept(3.0, 4.0, 1.0), "c": Kept(outputs=5.0)}
    assert Kept.by_name() == {}
