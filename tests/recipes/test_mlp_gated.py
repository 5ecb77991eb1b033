"""The joint candidate of a gated MLP: cost and loss against direct computation in fp64, eligible blocks, plans."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu

from rana_fx.recipes import Problem
from rana_fx.recipes.rana.allocate import allocate, cost_of, loss_of
from rana_fx.recipes.rana.candidates import UnitCandidates
from rana_fx.recipes.rana.decision import Choice, Decision
from rana_fx.recipes.rana.eligible_mlps import eligible_mlps
from rana_fx.recipes.rana.loss_metric import loss_basis, loss_metric
from rana_fx.recipes.rana.mlp_gated import GatedMlp
from rana_fx.recipes.rana.operating_point import OperatingPoint
from rana_fx.recipes.rana.quantization import unquantized
from rana_fx.recipes.rana.recipe import Rana
from rana_fx.recipes.rana.refine import Simulated, joint_correction
from rana_fx.recipes.rana.units import units_of
from rana_fx.recipes.simulate import Outcome, simulate
from tests.recipes.test_rana import Classifier, calibrated_with_holdout

WIDTH, FFN = 16, 40


class Gated(Classifier):
    """Two gated blocks with the given activation and the given operation after the product."""

    def __init__(self, activation=gelu, scale=None, bias=False):
        super().__init__(WIDTH)
        self.gates = nn.ModuleList(nn.Linear(WIDTH, FFN, bias=bias) for _ in range(2))
        self.activation, self.scale = activation, scale

    def forward(self, x):
        h = self.stem(x)
        for gate, up, down in zip(self.gates, self.ups, self.downs, strict=True):
            hidden = self.activation(gate(h)) * up(h)
            h = h + down(hidden if self.scale is None else hidden * self.scale)
        return {"logits": self.head(h)}


def batches(count=9):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 128, 4, generator=generator) * 2,) for _ in range(count)]


def calibrated(model):
    torch.manual_seed(0)
    return calibrated_with_holdout(model, batches())


def problem_of(model, **given):
    return as_problem(calibrated(model), **given)


def as_problem(calibration, *, metric="flops", budget=0.6):
    layout, samples, holdout = calibration
    return Problem(layout, samples, budget, metric, "rana", False, holdout=holdout)


@functools.cache
def gated(activation=gelu, bias=False):
    """(model, its calibration) for tests that change neither, with any metric and budget."""
    model = seeded(activation=activation, bias=bias)
    return model, calibrated(model)


def joint_of(problem, *, shared=True, gates=True):
    """(the joint candidate of the first block, rows it is measured on, the loss metric of down)."""
    (first, _) = eligible_mlps(problem.layout, units_of(problem.layout, shared=shared))
    rows = problem.rows(first.gate)[:1024]  # the number of rows that the candidate is measured on
    gradients = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 1, WIDTH)
    metric = loss_metric(problem.matrix((first.down,)), gradients.t() @ gradients / 400)
    return GatedMlp(problem, first, gate_candidates(problem, first.gate, rows, adapted=gates), rows, metric), rows, metric


def gate_candidates(problem, gate, rows, *, adapted=True):
    weight = problem.matrix((gate,))
    stored = unquantized(1.0 if problem.metric == "flops" else 4.0)
    if not adapted:
        stored = replace(stored, kinds=("dense",))
    metric = loss_metric(weight, None)
    return UnitCandidates(metric, loss_basis(metric, rows.t() @ rows / len(rows)), rows, [stored])


def seeded(**options):
    torch.manual_seed(0)
    return Gated(**options)


@pytest.mark.parametrize("activation", [gelu, silu, relu, torch.tanh])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("metric", ["flops", "bytes"])
@pytest.mark.parametrize("gates", [False, True])
def test_operating_points_cost_and_lose_what_they_predict(activation, bias, metric, gates):
    model, calibration = gated(activation, bias)
    joint, rows, of_down = joint_of(as_problem(calibration, metric=metric), gates=gates)
    with torch.no_grad():
        active, up = activation(model.gates[0](rows)).double(), model.ups[0](rows).double()
    hidden, met = active * up, active != 0
    importance = (up.square() * met).sum(0) / met.sum(0) * of_down.norms_I.double()
    neuron_cost = 2 * WIDTH * (1 if metric == "flops" else 4)
    assert len(joint._measured) >= 6 and joint.neuron_cost() == neuron_cost
    assert any(measured.gate[0] != "dense" for measured in joint._measured) == gates
    for measured in joint._measured:
        multiplier = math.exp(measured.log_multiplier)
        points = {unit: joint.point(unit, multiplier) for unit in joint.mlp.units}
        of_down_unit, of_gate_unit = points[joint.mlp.down_unit], points[joint.mlp.gate_unit]
        found, bias_O = joint.adapted(of_down_unit)
        torch.testing.assert_close(found.tau_F.double(), 2 * multiplier * neuron_cost / importance, rtol=1e-4, atol=0)
        # the gate as computed by its adapter
        adapters = joint.adapters(joint.mlp.gate_unit, of_gate_unit)
        gate = model.gates[0](rows).detach() if not adapters else acts(adapters[0], rows, model.gates[0])
        mask = activation(gate).double().square() >= found.tau_F
        changed = hidden - activation(gate).double() * up * mask
        lost = changed @ of_down.right_DI.double().t()
        together = float((lost - lost.mean(0)).square().sum(1).mean()) / 2
        # in fp32 some scores are on the other side of a threshold
        assert of_down_unit.kept == pytest.approx(float(mask.sum(1).double().mean()), abs=2 * FFN / len(rows))
        assert of_down_unit.cost == neuron_cost * of_down_unit.kept
        assert of_down_unit.loss == pytest.approx(together, rel=2e-2, abs=1e-9)
        if not gates:
            assert (of_gate_unit.cost, of_gate_unit.loss) == (neuron_cost * FFN / 2, 0.0)
        else:
            gate_point = of_gate_unit.gate
            assert of_gate_unit.cost == gate_point.cost and gate_point.multiplier == pytest.approx(0.7 * multiplier)
        down = model.downs[0]
        mean = (down.weight.double() @ changed.mean(0) + down.bias).detach()
        torch.testing.assert_close(bias_O.double(), mean, rtol=0, atol=1e-3 * float(mean.abs().max()))
    # between two multipliers: between the values measured there
    for low, high in zip(joint._measured, joint._measured[1:], strict=False):
        point = joint.point(joint.mlp.down_unit, math.exp((low.log_multiplier + high.log_multiplier) / 2))
        assert point.kept == pytest.approx((low.kept + high.kept) / 2)
        assert point.loss == pytest.approx((low.loss + high.loss) / 2)


def acts(adapter, rows, linear):
    """Outputs of an adapter, computed from its tensors."""
    v = rows
    if adapter.router is not None:
        if adapter.router_tau is not None:
            v = v * (v.square() >= adapter.router_tau)
        v = v @ (adapter.router if adapter.router_tau is not None else adapter.router.t())
    weight = linear.weight.detach().t() if adapter.weight is None else adapter.weight
    out = (v * (v.square() >= adapter.tau)) @ weight
    return out if linear.bias is None else out + linear.bias.detach()


def test_a_neuron_of_zero_importance_is_never_needed():
    model = seeded()
    with torch.no_grad():
        model.downs[0].weight[:, 3] = 0
        model.ups[0].weight[5], model.ups[0].bias[5] = 0, 0
    joint, _, _ = joint_of(problem_of(model))
    tau = joint.adapted(joint.point(joint.mlp.down_unit, 1e-30))[0].tau_F
    assert tau.isinf().nonzero().flatten().tolist() == [3, 5] and bool((tau > 0).all())


def eligible(model, *, shared=True):
    layout = problem_of(model).layout
    return [found.down for found in eligible_mlps(layout, units_of(layout, shared=shared))]


def test_a_joint_candidate_needs_the_product_in_front_of_down_and_units_of_its_own():
    assert eligible(seeded()) == ["downs.0", "downs.1"]
    assert eligible(seeded(), shared=False) == ["downs.0", "downs.1"]
    # an operation after the product may map zero to any value, and the rewrite masks a factor of down's input
    assert eligible(seeded(scale=1.5)) == []
    layout = problem_of(Classifier()).layout
    kinds = [eligible_mlps(layout, units_of(layout), given) for given in (("gated", "exact"), ("exact",), ("gated",))]
    assert [[found.kind for found in mlps] for mlps in kinds] == [["exact", "exact"], ["exact", "exact"], []]

    class Parallel(Gated):
        """Another linear reads the input of gate and up."""

        def __init__(self):
            super().__init__()
            self.beside = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            h = self.stem(x)
            h = h + self.beside(h) + self.downs[0](gelu(self.gates[0](h)) * self.ups[0](h))
            return {"logits": self.head(h)}

    assert eligible(Parallel()) == []
    assert eligible(Parallel(), shared=False) == ["downs.0"]


def test_with_units_of_their_own_the_gate_is_counted_once():
    joint, _, _ = joint_of(as_problem(gated()[1]), shared=False, gates=False)
    assert [joint.point(unit, 1e-3).cost for unit in (("gates.0",), ("ups.0",))] == [WIDTH * FFN, 0.0]


def joint_decisions(scales):
    """Two MLPs, each with input masks and a joint candidate; ``scales``: isotropic scale of the loss metric in each block."""
    problem = as_problem(gated()[1])
    decisions = []
    for mlp, scale in zip(eligible_mlps(problem.layout, units_of(problem.layout)), scales, strict=True):
        metrics = {unit: loss_metric(problem.matrix(unit), None, isotropic_scale=scale) for unit in mlp.units}
        candidates = {
            unit: UnitCandidates(metric, None, problem.rows(unit[0])[:2048], [unquantized(1.0)])
            for unit, metric in metrics.items()
        }
        rows = problem.rows(mlp.gate)[:2048]
        gate = gate_candidates(problem, mlp.gate, rows, adapted=False)
        decisions.append(Decision(candidates, GatedMlp(problem, mlp, gate, rows, metrics[mlp.down_unit])))
    return decisions


def alone(decisions, target, jointly):
    """Loss at the multiplier at which masks, and joint candidates of the blocks ``jointly``, cost the target; inf: none."""

    def points(multiplier):
        found = []
        for index, decision in enumerate(decisions):
            for unit, candidates in decision.candidates.items():
                if index in jointly:
                    found.append(decision.joint.point(unit, multiplier))
                else:
                    each = [candidates.point(kind, multiplier) for kind in ("dense", "neuron")]
                    found.append(min(each, key=lambda point: point.lagrangian))
        return found

    low, high = -40.0, 5.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(point.cost for point in points(math.exp(middle))) > target else (low, middle)
    found = points(math.exp(high))
    near = abs(sum(point.cost for point in found) - target) < 0.01 * target
    return sum(point.loss for point in found) if near else math.inf


@pytest.mark.parametrize("fraction", [0.9, 0.75, 0.6, 0.5, 0.42, 0.35, 0.15])
def test_a_block_is_joint_as_a_whole_or_not_at_all_where_that_loses_less(fraction):
    joint = set()
    for scales in ((1.0, 1.0), (1.0, 30.0), (100.0, 1.0)):
        decisions = joint_decisions(scales)
        target = fraction * sum(decision.dense_cost for decision in decisions)
        found = allocate(decisions, target)
        points = found.points(decisions)
        assert cost_of(points) == pytest.approx(target, rel=0.01)
        for decision in decisions:
            assert len({found.chosen[unit] == Choice("gated") for unit in decision.units}) == 1
        joint |= {unit for unit in points if found.chosen[unit] == Choice("gated")}
        ways = [alone(decisions, target, jointly) for jointly in ((), (0,), (1,), (0, 1))]
        assert loss_of(points) <= 1.02 * min(ways)
        assert not any(point.kind == "gated" for point in allocate(decisions, target, joint=False).points(decisions).values())
    # one of the two gates costs a sixth of all
    assert bool(joint) == (fraction > 1 / 6)


def test_a_correction_raises_the_loss_and_lowers_the_thresholds_without_changing_the_candidate():
    joint, _, _ = joint_of(as_problem(gated()[1]))
    down, gate = joint.mlp.down_unit, joint.mlp.gate_unit
    multiplier = 3 * math.exp(joint._measured[3].log_multiplier)
    predicted, gate_cost = joint.point(down, multiplier / 3), joint.point(gate, multiplier / 3).cost
    found = joint.point(down, multiplier, 3.0)
    expected = (predicted.kept, predicted.joint_multiplier, 3 * predicted.loss)
    assert (found.kept, found.joint_multiplier, found.loss) == pytest.approx(expected)
    assert joint.point(gate, multiplier, 3.0).cost == pytest.approx(gate_cost)
    assert joint.point(down, multiplier / 3) == predicted


def test_a_correction_moves_a_block_away_from_its_joint_candidate():
    decisions = joint_decisions((1.0, 1.0))
    target = 0.5 * sum(decision.dense_cost for decision in decisions)
    counts = [
        sum(choice == Choice("gated") for choice in allocate(decisions, target, correction=correction).chosen.values())
        for correction in (1.0, 1e3)
    ]
    assert counts[0] > counts[1] == 0


@pytest.mark.parametrize(
    ("whole", "apart", "expected"),
    [
        # the loss of masks is 1.5 times the prediction, and so is that of joint candidates
        ((1.0, 2.0, 4.5), (5.0, 7.5), 1.0),
        # only the excess is attributed to joint candidates: (6 / 1.5 - 1) / 2
        ((1.0, 2.0, 6.0), (5.0, 7.5), 1.5),
        ((1.0, 2.0, 60.0), (5.0, 7.5), 4.0),
        ((1.0, 0.0, 6.0), (5.0, 7.5), 1.0),
        ((1.0, 2.0, 6.0), (5.0, 0.0), 1.0),
    ],
)
def test_the_correction_is_measured_over_predicted_loss(whole, apart, expected):
    masks, joint, moved = whole
    points = {("up",): OperatingPoint("neuron", 1.0, 1.0, masks), ("down",): OperatingPoint("gated", 1.0, 1.0, joint)}
    predicted = {("up",): OperatingPoint("neuron", 1.0, 1.0, apart[0])}
    found = [Simulated(given, Outcome({}, value), 1.0) for given, value in ((points, moved), (predicted, apart[1]))]
    assert joint_correction(*found) == pytest.approx(expected)


@pytest.mark.parametrize("budget", [0.7, 0.5, 0.4])
def test_joint_candidates_are_taken_only_where_held_out_batches_lose_less_by_them(budget):
    moved, joint = [], []
    for kinds in (("dense", "neuron"), ("dense", "neuron", "gated")):
        problem = as_problem(gated()[1], budget=budget)
        with torch.no_grad():
            made = Rana(kinds=kinds, allocations=("multiplier",)).solve(problem)
            with problem.holdout.instrumented(problem.layout) as stage:
                dense = [stage.run(batch) for batch in problem.holdout.held]
                moved.append(simulate(stage, problem.layout, made, problem.holdout.held, dense).divergence)
        joint.append(any(adapter.kind == "gated" for adapter in made))
    assert joint[0] is False
    assert moved[1] < moved[0] if joint[1] else moved[1] == pytest.approx(moved[0], rel=1e-6)
