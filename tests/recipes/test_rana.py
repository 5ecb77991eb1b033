"""Recipe rana, piece by piece, against direct computation in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.holdout import Tee
from rana_fx.calibration.sensitivity import sensitivities
from rana_fx.evaluation.measure import measuring
from rana_fx.recipes import RECIPES, Problem
from rana_fx.recipes.rana.allocate import Allocation, allocate, cost_of, loss_of
from rana_fx.recipes.rana.candidates import UnitCandidates, UnitSite
from rana_fx.recipes.rana.components import GRID_STEP
from rana_fx.recipes.rana.decision import Choice, Decision
from rana_fx.recipes.rana.loss_metric import loss_basis, loss_metric
from rana_fx.recipes.rana.quantization import quantized_formats, unquantized
from rana_fx.recipes.rana.recipe import Rana
from rana_fx.recipes.rana.units import units_of
from rana_fx.recipes.simulate import simulate

SHAPES = [(24, 10), (10, 24), (12, 12)]


def draw(out, width, *, rows=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    x = torch.randn(rows, width, generator=generator) * torch.linspace(0.2, 2, width)
    gradients = torch.randn(rows, out, generator=generator) * torch.linspace(0.1, 1, out)
    return weight, x, gradients


def moment_of(weight, gradients):
    out, width = weight.shape
    rows = gradients @ weight if out > width else gradients
    return rows.t() @ rows / len(rows)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_the_loss_metric_weights_errors_by_their_gradients(out, width):
    weight, x, gradients = draw(out, width)
    found = loss_metric(weight, moment_of(weight, gradients))
    torch.testing.assert_close(found.left_OD @ found.right_DI, weight, rtol=0, atol=1e-4)
    output_moment = (gradients.t() @ gradients / len(gradients)).double()
    error = (x[:50] @ weight.t()).double()
    given = torch.einsum("to,op,tp->t", error, output_moment, error)
    # a tenth of the metric is isotropic over the outputs, or over W times the inputs
    trace = output_moment.diagonal().sum() / out
    if out > width:
        wide = weight.double()
        trace = (wide.t() @ output_moment @ wide).diagonal().sum() / wide.square().sum()
    expected = 0.9 * given + 0.1 * trace * error.square().sum(1)
    torch.testing.assert_close((x[:50] @ found.right_DI.t()).square().sum(1).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_basis_is_complete_and_ordered_by_energy(out, width):
    weight, x, gradients = draw(out, width)
    found = loss_metric(weight, moment_of(weight, gradients))
    basis = loss_basis(found, x.double().t() @ x.double() / len(x))
    torch.testing.assert_close(basis.a_OD @ basis.b_DI, weight, rtol=0, atol=1e-4)
    # components are orthonormal in the loss's coordinates: their squares add up to the whole
    z = x @ basis.b_DI.t()
    torch.testing.assert_close(z.square().sum(1), (x @ found.right_DI.t()).square().sum(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "neuron", "rank", "hybrid", "static"])
@pytest.mark.parametrize("place", [0.0, 0.4])  # on the grid of multipliers, and between two of them
def test_operating_points_cost_and_lose_what_they_predict(kind, place):
    out, width = 24, 10
    weight, x, gradients = draw(out, width)
    found = loss_metric(weight, moment_of(weight, gradients))
    basis = loss_basis(found, x.double().t() @ x.double() / len(x))
    candidates = UnitCandidates(found, basis, x, [unquantized(1.0)])
    rough = 0.02 * float((x @ found.right_DI.t()).square().sum(1).mean()) / (out * width)
    multiplier = math.exp(GRID_STEP * (math.floor(math.log(rough) / GRID_STEP) + place))
    point = candidates.point(kind, multiplier)
    exact = x @ found.right_DI.t()
    if kind == "dense":
        cost, made = out * width, exact
    elif kind == "neuron":
        mask = x.square() >= candidates.input_thresholds(point)[0]
        cost, made = out * float(mask.sum(1).float().mean()), (x * mask) @ found.right_DI.t()
    else:
        rows = x
        router = width * point.ranks
        if kind == "hybrid":
            inputs = x.square() >= candidates.input_thresholds(point)[0]
            rows, router = x * inputs, point.ranks * float(inputs.sum(1).float().mean())
        z = rows @ basis.b_DI[: point.ranks].t()
        mask = z.square() >= candidates.components.threshold(point)
        cost = router + out * float(mask.sum(1).float().mean())
        made = (z * mask) @ (torch.linalg.pinv(found.left_OD) @ basis.a_OD[:, : point.ranks]).t()
    lost = float((exact - made).square().sum(1).mean()) / 2
    # counts are exact on the grid; a bin of the histogram is 0.8 % wide, and multipliers of the grid are 10 % apart
    near = {"dense": 1e-5, "neuron": 5e-3}.get(kind, 1e-5 if place == 0 else 0.03)
    assert point.cost == pytest.approx(cost, rel=near)
    if kind in ("rank", "hybrid", "static") and place > 0:
        sides = [candidates.point(kind, multiplier * math.exp(GRID_STEP * step)).loss for step in (-place, 1 - place)]
        assert min(sides) <= point.loss <= max(sides)
    else:
        # correlations of dropped inputs are measured at a few thresholds only
        assert point.loss == pytest.approx(lost, rel=0.05 if kind == "neuron" else 1e-3, abs=1e-6)


def test_components_are_in_the_models_dtype():
    weight, x, gradients = draw(24, 10)
    found = loss_metric(weight, moment_of(weight, gradients))
    basis = loss_basis(found, x.double().t() @ x.double() / len(x))
    candidates = UnitCandidates(found, basis, x.bfloat16(), [unquantized(1.0)], dtype=torch.bfloat16)
    matrices = [value for value in vars(candidates.components).values() if isinstance(value, torch.Tensor) and value.dim() == 2]
    assert matrices and all(value.dtype == torch.bfloat16 for value in matrices)
    components = candidates.components
    torch.testing.assert_close(components.factor_DO.t().float() @ components.router_DI.float(), weight, rtol=0, atol=0.05)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_components_survive_16_bits_however_small_an_error_is_in_units_of_loss(size):
    weight, x, gradients = draw(24, 10)
    found = loss_metric(weight, moment_of(weight, gradients * size))
    basis = loss_basis(found, x.double().t() @ x.double() / len(x))
    candidates = UnitCandidates(found, basis, x.half(), [unquantized(1.0)], dtype=torch.float16)
    components = candidates.components
    lengths = torch.linalg.vector_norm(components.factor_DO.float(), dim=1)
    assert lengths.min() > 0.7 and lengths.max() < 1.42
    # fp16 rounds both by at most 2^-11, and 10 products are added
    bound = 2 * 2**-11 * components.factor_DO.t().float().abs() @ components.router_DI.float().abs()
    assert ((components.factor_DO.t().float() @ components.router_DI.float() - weight).abs() <= bound + 1e-5).all()
    # rows, components and their energies are those of the loss
    assert float(components._z2_D.sum()) == pytest.approx(float((x @ found.right_DI.t()).square().sum(1).mean()), rel=1e-2)


def test_no_candidate_is_better_than_its_lower_bound():
    weight, x, gradients = draw(64, 32)
    found = loss_metric(weight, moment_of(weight, gradients))
    moment = x.double().t() @ x.double() / len(x)
    basis = loss_basis(found, moment)
    candidates = UnitCandidates(
        found, basis, x, [unquantized(4.0), *quantized_formats(found, basis, {"site": weight}, moment, rate=4.0, uses=1)]
    )
    for kind, index in candidates.entries:
        for exponent in range(-14, -4):
            multiplier = math.exp(exponent)
            point = candidates.point(kind, multiplier, format_index=index)
            # between two multipliers of the grid a point is a mean, which may be a little off
            bound = candidates.lower_bound(kind, multiplier, format_index=index)
            assert bound <= 1.01 * (point.loss + multiplier * point.cost)


def three_decisions():
    decisions = []
    for seed, (out, width) in enumerate(SHAPES):
        weight, x, gradients = draw(out, width, seed=seed)
        found = loss_metric(weight, moment_of(weight, gradients))
        basis = loss_basis(found, x.double().t() @ x.double() / len(x))
        decisions.append(Decision({(f"unit{seed}",): UnitCandidates(found, basis, x, [unquantized(1.0)])}))
    return decisions


@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.25])
def test_one_multiplier_meets_the_target_and_loses_less_than_one_fraction(fraction):
    decisions = three_decisions()
    target = fraction * sum(decision.dense_cost for decision in decisions)
    points = allocate(decisions, target).points(decisions)
    # a component adds a whole row of the router
    assert cost_of(points) == pytest.approx(target, rel=0.05)
    uniform = sum(loss_of(allocate([one], fraction * one.dense_cost).points([one])) for one in decisions)
    assert loss_of(points) <= uniform * 1.05


def test_each_linear_of_a_unit_has_thresholds_of_its_own():
    weight, x, gradients = draw(24, 10)
    gradients[:, :12] *= 0.01  # the output does not depend on the first linear
    found = loss_metric(weight, moment_of(weight, gradients))
    sites = [UnitSite(12, (gradients[:, part] @ weight[part]).square().mean(0)) for part in (slice(0, 12), slice(12, 24))]
    candidates = UnitCandidates(found, None, x, [unquantized(1.0)], sites)
    assert candidates.entries == [("dense", 0), ("neuron", 0)]
    first, second = candidates.point("neuron", 1e-3).kept_by_site
    assert first < second
    assert len(candidates.input_thresholds(candidates.point("neuron", 1e-3))) == 2


class Classifier(nn.Module):
    """Two residual blocks and a head: the smallest model with all roles."""

    def __init__(self, width=16, classes=6):
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.ups = nn.ModuleList(nn.Linear(width, 40) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(40, width) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        h = self.stem(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            h = h + down(torch.nn.functional.gelu(up(h)))
        return {"logits": self.head(h)}


def calibrated_with_holdout(model, batches):
    tee = Tee(batches)
    found = calibrate(model, tee, wanted=RECIPES["rana"].wants, progress=False)
    return found.layout, found.samples, tee.holdout(model)


def test_gradients_are_those_of_the_divergence():
    torch.manual_seed(0)
    model = Classifier()
    batches = [(torch.randn(4, 512, 4),) for _ in range(9)]
    layout, _, holdout = calibrated_with_holdout(model, batches)
    assert len(holdout.held) == 1 and len(holdout.batches) == 4
    with holdout.instrumented(layout) as instrumented:
        found = sensitivities(instrumented, layout, units_of(layout), holdout.batches)
    # at the last down projection the Fisher information is known: W^T (diag p - p p^T) W
    x = torch.cat([batch[0] for batch in holdout.batches]).reshape(-1, 4)
    p = model(x)["logits"].softmax(-1).double()
    fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    head = model.head.weight.double()
    expected = (head.t() @ fisher @ head).float().detach()
    moment = found.moments[("downs.1",)]
    # one label per token: 8192 of them
    assert float((moment - expected).norm() / expected.norm()) < 0.1
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_simulation_keeps_and_loses_what_the_attached_plan_does():
    torch.manual_seed(0)
    model = Classifier()
    batches = [(torch.randn(4, 128, 4),) for _ in range(9)]
    layout, samples, holdout = calibrated_with_holdout(model, batches)
    problem = Problem(layout, samples, 0.5, "flops", "rana", False, holdout=holdout)
    with torch.no_grad():
        adapters = RECIPES["rana"].solve(problem)
        with holdout.instrumented(layout) as instrumented:
            dense = [instrumented.run(batch) for batch in holdout.held]
            outcome = simulate(instrumented, layout, adapters, holdout.held, dense)
    plan = rana_fx.adapt(model, batches, budget=0.5, recipe="rana", progress=False)
    with measuring(model) as meter:
        output = meter.run(holdout.held[0])["logits"]
        measured = meter.result()
    ranks = {adapter.name: adapter.ranks for adapter in plan.adapters}
    assert {name: kept.ranks / ranks[name] for name, kept in outcome.kept.items()} == pytest.approx(measured.density, rel=1e-3)
    assert measured.budget_flops == pytest.approx(0.5, abs=0.02)
    log_p, log_q = dense[0]["logits"].log_softmax(-1), output.log_softmax(-1)
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert outcome.divergence == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_gradients_are_taken_inside_inference_mode():
    torch.manual_seed(0)
    model = Classifier()
    batches = [(torch.randn(4, 128, 4),) for _ in range(9)]
    with torch.inference_mode():
        inside = rana_fx.adapt(model, batches, budget=0.5, progress=False)
    rana_fx.detach(model)
    outside = rana_fx.adapt(model, batches, budget=0.5, progress=False)
    assert inside.digest() == outside.digest()


def test_formats_predict_what_rounding_costs_and_loses():
    weight, x, gradients = draw(64, 32)
    found = loss_metric(weight, moment_of(weight, gradients))
    basis = loss_basis(found, x.double().t() @ x.double() / len(x))
    formats = [unquantized(4.0), *quantized_formats(found, basis, {"site": weight}, x.t() @ x / len(x), rate=4.0, uses=1)]
    candidates = UnitCandidates(found, basis, x, formats)
    assert [kind for kind, index in candidates.entries if index == 0] == ["dense", "neuron", "rank", "hybrid", "static"]
    stored = [candidates.point("stored", 1e-6, format_index=index) for index in (1, 2)]
    # a byte or half of one for each number, and two bytes of scale for each row or group
    assert [point.cost for point in stored] == pytest.approx([32 * (64 + 2), 32 * (32 + 2)])
    assert 0 < stored[0].loss < stored[1].loss / 50
    mean = float((gradients.t() @ gradients / len(gradients)).diagonal().mean())
    dequantized = formats[2].packed["site"].dequantize()
    expected = float((x @ (dequantized - weight.t())).square().sum(1).mean()) / 2
    assert stored[1].loss == pytest.approx(expected * found.isotropic_scale, rel=1e-4)
    assert found.isotropic_scale == pytest.approx(mean, rel=0.3)
    hybrids = [candidates.point("hybrid", 1e-4, format_index=index) for kind, index in candidates.entries if kind == "hybrid"]
    assert all(point.ranks % formats[point.format_index].rank_multiple == 0 for point in hybrids)
    assert {stored.rank_multiple for stored in formats} == {1, 2}
    assert min(hybrids, key=lambda point: point.cost).format_index > 0


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.2, 0.1])
def test_formats_meet_the_target_and_lose_less_than_one_format_for_all(fraction):
    decisions = []
    for seed, (out, width) in enumerate([(64, 32), (32, 64), (96, 32)]):
        weight, x, gradients = draw(out, width, seed=seed)
        found = loss_metric(weight, moment_of(weight, gradients))
        basis = loss_basis(found, x.double().t() @ x.double() / len(x))
        formats = [unquantized(4.0), *quantized_formats(found, basis, {"site": weight}, x.t() @ x / len(x), rate=4.0, uses=1)]
        decisions.append(Decision({(f"unit{seed}",): UnitCandidates(found, basis, x, formats)}))
    target = fraction * sum(decision.dense_cost for decision in decisions)
    points = allocate(decisions, target).points(decisions)
    assert cost_of(points) <= target * 1.03
    for index in (0, 1, 2):
        alone = Allocation(1e-20, {decision.units[0]: Choice("neuron", index) for decision in decisions})
        if cost_of(alone.points(decisions)) >= target:
            alone = alone.at_cost(decisions, target)
        assert loss_of(points) <= 1.02 * loss_of(alone.points(decisions))


def test_a_linear_that_reads_another_one_directly_reads_what_the_step_made_of_it():
    class Chain(Classifier):
        def forward(self, x):
            h = self.stem(x)
            return {"logits": self.head(h + self.downs[0](self.ups[0](h)))}

    model = Chain()
    layout, _, holdout = calibrated_with_holdout(model, [(torch.randn(2, 16, 4),) for _ in range(2)])
    seen = {}

    def step(name, x, y):
        seen[name] = x
        return torch.zeros_like(y) if name == "ups.0" else y

    with holdout.instrumented(layout) as instrumented:
        instrumented.run(holdout.held[0], step)
    assert float(seen["ups.0"].abs().sum()) > 0
    assert float(seen["downs.0"].abs().sum()) == 0


def test_ingredients_that_are_left_out_are_not_in_the_plan():
    torch.manual_seed(0)
    batches = [(torch.randn(4, 128, 4),) for _ in range(9)]
    layout, samples, holdout = calibrated_with_holdout(Classifier(), batches)

    def solved(metric="flops", budget=0.5, **left_out):
        problem = Problem(layout, samples, budget, metric, "rana", False, holdout=holdout)
        with torch.no_grad():
            return Rana(**left_out).solve(problem)

    kinds = {adapter.kind for adapter in solved(kinds=("dense", "neuron"))}
    assert kinds == {"neuron"}
    assert all(a.router_tau is None for a in solved(kinds=("dense", "neuron", "rank")))
    assert any(a.router_tau is not None for a in solved(kinds=("dense", "hybrid")))
    stored = solved("bytes", 0.3)
    assert any(adapter.weight_scale is not None for adapter in stored)
    for bits, allowed in (((), set()), ((8,), {torch.int8}), ((4,), {torch.uint8})):
        made = solved("bytes", 0.4, bits=bits)
        assert {a.weight.dtype for a in made if a.weight_scale is not None} <= allowed
    # a multiplier fitted once costs what was predicted on the dense model's inputs
    (predicted, refined) = (sum(a.flops for a in solved(refine_lambda=value)) for value in (False, True))
    assert predicted != refined
    # one fraction for all: no unit exceeds it
    even = solved(kinds=("dense", "neuron"), allocations=("fraction",), refine_lambda=False)
    assert all(adapter.flops == pytest.approx(0.5 * adapter.dense_flops, rel=0.1) for adapter in even)


def test_linears_may_be_units_of_their_own():
    class Pair(Classifier):
        def forward(self, x):
            h = self.stem(x)
            h = h + self.downs[0](torch.nn.functional.gelu(self.ups[0](h)) * self.ups[1](h))
            return {"logits": self.head(h)}

    layout, _, _ = calibrated_with_holdout(Pair(), [(torch.randn(4, 128, 4),)])
    assert ("ups.0", "ups.1") in units_of(layout)
    assert units_of(layout, shared=False) == [("ups.0",), ("ups.1",), ("downs.0",)]
