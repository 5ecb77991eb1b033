"""Curves: intervals over documents, and the curve of a plan on disk."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import rana_fx
from rana_fx import plan_io
from rana_fx.curve import Curve, CurvePoint, Interval, Promise
from rana_fx.errors import PlanFileError
from rana_fx.plan import Plan
from rana_fx.recipes.intervals import mean_interval, perplexity_interval, t_quantile

POINT = CurvePoint(0.5, 0.49, 0.51, Interval(0.02, 0.01, 0.03), Interval(0.03, -0.01, 0.07), None, 20, 5000)
CURVE = Curve((POINT, replace(POINT, budget=0.7, kl=None, loss=None)), Promise("max_kl", 0.04))
PLAN = Plan("rana", "flops", 0.5, 0, 100, "M", {}, (), (), (), curve=CURVE)


@pytest.mark.parametrize(("freedom", "expected"), [(7, 2.364624), (11, 2.200985), (31, 2.039513), (63, 1.998341)])
def test_quantiles_of_t(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=1e-3)


def test_documents_of_one_length_have_the_interval_of_their_means():
    sums = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = mean_interval(7 * sums, torch.full((12,), 7.0, dtype=torch.float64))
    half = t_quantile(11) * float(sums.std()) / math.sqrt(12)
    assert found.mean == pytest.approx(float(sums.mean()))
    assert (found.low, found.high) == (pytest.approx(found.mean - half), pytest.approx(found.mean + half))


def test_intervals_contain_the_mean_as_often_as_they_say():
    """Of ratios over documents of random lengths, whose longer ones have larger means: 95 % of 2000 draws, at any seed."""
    generator = torch.Generator().manual_seed(0)
    number, draws, inside, ups = 12, 2000, 0, 0.0
    for _ in range(draws):
        counts = torch.randint(50, 500, (number,), generator=generator).double()
        means = 0.02 + 0.005 * torch.randn(number, generator=generator).double() + 1e-5 * counts
        found = mean_interval(means * counts, counts)
        exact = 0.02 + 1e-5 * (274.5**2 + (450**2 - 1) / 12) / 274.5  # E[counts^2] / E[counts]
        inside += found.low <= exact <= found.high
        ups += found.high >= exact
    # four standard deviations of a share of .95, and the few per mille that a linearised ratio of 12 may lack
    assert inside / draws == pytest.approx(0.95, abs=0.02 + 0.01)
    assert ups / draws > 0.95


def test_perplexity_is_linearised_in_both_losses():
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(50, 500, (400,), generator=generator).double()
    dense = counts * (3 + 0.3 * torch.randn(400, generator=generator).double())
    adapted = dense + counts * (0.05 + 0.01 * torch.randn(400, generator=generator).double())
    found = perplexity_interval(dense, adapted, counts)
    one, two = (float(sums.sum() / counts.sum()) for sums in (dense, adapted))
    assert found.mean == pytest.approx(math.exp(two) - math.exp(one))
    drawn = torch.randint(400, (4000, 400), generator=generator)
    means = [sums[drawn].sum(1) / counts[drawn].sum(1) for sums in (dense, adapted)]
    spread = float((means[1].exp() - means[0].exp()).std())
    # 4000 resamples know a deviation to 1.1 %
    assert (found.high - found.low) / 2 == pytest.approx(t_quantile(399) * spread, rel=0.05)
    huge = perplexity_interval(1000 * counts, 1001 * counts, counts)
    assert math.isfinite(huge.high) and huge.mean > 1e300


def test_a_curve_is_saved_with_its_plan(tmp_path):
    PLAN.save(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == plan_io.FORMAT == 5
    found = rana_fx.load_plan(tmp_path)
    assert found.curve == CURVE and found.digest() == PLAN.digest()
    assert found.curve.at(0.5) == POINT and found.curve.at(0.6) is None


def test_plans_without_a_curve_are_written_as_before(tmp_path):
    plan = replace(PLAN, curve=None)
    plan.save(tmp_path)
    header = json.loads((tmp_path / "plan.json").read_text())
    assert header["format"] == plan_io.BEFORE == 2 and "curve" not in header["plan"]
    assert rana_fx.load_plan(tmp_path).curve is None


def test_the_summary_has_the_promise_and_the_measurement():
    lines = PLAN.summary().splitlines()
    assert "  promised KL divergence, nats per token: at most 0.04; measured 0.0200, at most 0.0300 (95 %)" in lines
    measured = "KL 0.0200 (0.0100 to 0.0300), loss + 0.0300 (-0.0100 to 0.0700)"
    assert f"  on 20 held-out documents, 5,000 tokens: {measured}" in lines
    assert "held-out" not in replace(PLAN, curve=None).summary()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"points": (POINT, POINT)}, r"budgets \[0.5, 0.5\] do not ascend"),
        ({"promise": Promise("max_joy", 1.0)}, "promise 'max_joy' is none of max_kl"),
        ({"promise": Promise("max_kl", -1.0)}, "promise of -1.0"),
        ({"points": (replace(POINT, kl=Interval(0.2, 0.3, 0.4)),)}, "kl "),
        ({"points": (replace(POINT, tokens=-1),)}, "-1 tokens"),
        ({"points": (replace(POINT, flops=math.nan),)}, "budget and costs"),
    ],
    ids=str,
)
def test_invalid_curves_are_refused(change, fault, tmp_path):
    replace(PLAN, curve=replace(CURVE, **change)).save(tmp_path)
    with pytest.raises(PlanFileError, match=fault):
        rana_fx.load_plan(tmp_path)


def test_a_promise_that_was_changed_is_noticed(tmp_path):
    PLAN.save(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"limit": 0.04', '"limit": 0.03'))
    with pytest.raises(PlanFileError, match="does not match its digest"):
        rana_fx.load_plan(tmp_path)
