"""Gated adapters in other graphs than their plan was made on: what is masked there, what is dense, and what is said."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rana_fx
from rana_fx.apply import gate_mask
from rana_fx.kernels.ops import masked_gemv, masked_rows
from rana_fx.passes.runner import run
from rana_fx.runtime.attachment import attached
from tests.support import trained

WIDTH, FFN = 16, 40
# fp64 throughout, so that dropout draws the same numbers for the oracle: what remains is the order of sums over FFN neurons
BOUND = 100 * torch.finfo(torch.float64).eps


class Mlp(nn.Module):
    """``down(between(silu(gate(x)) * up(x)))``. ``between`` may return (what down reads, a further output)."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
        self.scale = nn.Parameter(torch.rand(FFN) + 0.5)
        self.between, self.product = lambda _, h: h, lambda _, gate, up: F.silu(gate) * up

    def forward(self, x):
        hidden = self.between(self, self.product(self, self.gate(x), self.up(x)))
        hidden, more = hidden if isinstance(hidden, tuple) else (hidden, None)
        y = self.down(hidden)
        return y if more is None else (y, more)


@pytest.fixture(scope="module")
def planned():
    """fp64, and a plan of recipe cats that was made for the plain form."""
    torch.manual_seed(0)
    model = Mlp()
    rana_fx.adapt(model, [torch.randn(64, WIDTH) for _ in range(3)], budget=0.7, recipe="cats", progress=False)
    plan = rana_fx.detach(model)
    (adapter,) = plan.adapters
    return model, replace(plan, adapters=(replace(adapter, bias=torch.randn(WIDTH)),))


@pytest.fixture
def model(planned):
    model, plan = copy.deepcopy(planned[0]), planned[1]
    rana_fx.attach(model, plan)
    return model.double()


X = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def relative(got, expected):
    return trained.relative(got.detach(), expected.detach())


def rewritten(model):
    """(outputs, operations of the graphs, (linear, reason) of what is left)."""
    targets, left = [], []

    def backend(gm, example_inputs):
        left.extend(run(gm, example_inputs).not_applied)
        targets.extend(node.target for node in gm.graph.nodes)
        return gm.forward

    torch.compiler.reset()
    torch.manual_seed(5)
    return torch.compile(model, backend=backend)(X), targets, [tuple(place) for place in left]


def oracle(model, *, masked=True):
    """The same forward in eager mode: with a gate masked by hand and the plan's bias of down; or the dense model."""
    twin = copy.deepcopy(model)
    (adapter,) = attached(model).plan.adapters
    if not masked:
        torch.manual_seed(5)
        return twin(X)
    twin.down.bias.data = adapter.bias.double()
    silu, tau = F.silu, adapter.tau.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "silu", lambda gate: torch.where(silu(gate).square() >= tau, silu(gate), 0.0))
        torch.manual_seed(5)
        return twin(X)


def dropped(self, h):
    return F.dropout(h, 0.3, True)


def scaled(self, h):
    return -h * self.scale / 2


def reshaped_and_dropped(self, h):
    return F.dropout(h.view(-1, FFN), 0.3, True).view(h.shape)


KEEP_ZEROS = {f.__name__: f for f in (dropped, scaled, reshaped_and_dropped)}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", KEEP_ZEROS)
def test_what_keeps_zeros_may_lie_between(model, name, gradients):
    model.between = KEEP_ZEROS[name]
    with torch.set_grad_enabled(gradients):
        got, targets, left = rewritten(model)
    assert left == []
    assert (targets.count(gate_mask), targets.count(masked_gemv), targets.count(masked_rows)) == (1, 1, int(not gradients))
    assert relative(got, oracle(model)) < BOUND < relative(got, oracle(model, masked=False))


def test_a_cast_may_lie_between(model):
    model.product = lambda _, gate, up: (F.silu(gate).float() * up.float()).double()
    with torch.no_grad():
        got, targets, left = rewritten(model)
    assert left == [("up", left[0][1])] and "cast" in left[0][1]
    assert (targets.count(gate_mask), targets.count(masked_gemv)) == (1, 1)
    # both round the factors to fp32; only the mask may differ by it, for a gate within rounding of its threshold
    assert relative(got, oracle(model)) < 100 * torch.finfo(torch.float32).eps


def test_the_mask_is_in_front_of_dropout_of_the_gate(model):
    """Dropout scales what it leaves: its threshold would be another one behind it."""
    model.product = lambda _, gate, up: F.dropout(F.silu(gate), 0.5, True) * up
    got, targets, left = rewritten(model)
    assert left == [] and targets.count(masked_gemv) == 1
    assert relative(got, oracle(model)) < BOUND


def shifted(self, h):
    return h + 0.1


def alpha_dropout(self, h):
    return F.alpha_dropout(h, 0.3, True)


def inverted(self, h):
    return torch.cos(h)


@pytest.mark.parametrize("form", [shifted, alpha_dropout, inverted], ids=lambda form: form.__name__)
def test_what_changes_zeros_leaves_the_mask_without_skipping(model, form):
    model.between = form
    with torch.no_grad():
        got, targets, left = rewritten(model)
    assert (targets.count(gate_mask), targets.count(masked_gemv), targets.count(masked_rows)) == (1, 0, 1)
    assert [name for name, _ in left] == ["down"] and "the gate is masked, and no row skipped" in left[0][1]
    assert relative(got, oracle(model)) < BOUND < relative(got, oracle(model, masked=False))


def normed(self, h):
    return F.rms_norm(h, (FFN,))


def broken(self, h):
    torch._dynamo.graph_break()
    return h


@pytest.mark.parametrize("form", [normed, broken], ids=lambda form: form.__name__)
def test_a_product_that_is_not_found_leaves_the_layer_dense(model, form):
    model.between = form
    with torch.no_grad():
        got, targets, left = rewritten(model)
    assert not {gate_mask, masked_gemv, masked_rows}.intersection(targets)
    assert [name for name, _ in left] == ["down"] and "it runs dense" in left[0][1]
    assert relative(got, oracle(model, masked=False)) < BOUND


def test_hooks_are_part_of_the_graph(model):
    model.down.register_forward_pre_hook(lambda _, args: (args[0] * 2 + 1,))
    model.up.register_forward_hook(lambda _, args, out: out.clamp(max=1.0))
    with torch.no_grad():
        got, _, left = rewritten(model)
    assert [name for name, _ in left] == ["down", "up"]
    assert relative(got, oracle(model)) < BOUND


def test_who_else_reads_the_product_reads_it_whole(model):
    model.between = lambda _, h: (F.dropout(h, 0.3, True), h * 1.0)
    with torch.no_grad():
        (got, more), targets, left = rewritten(model)
    assert (targets.count(gate_mask), targets.count(masked_gemv), targets.count(masked_rows)) == (0, 1, 0)
    assert [name for name, _ in left] == ["up"] and "read by others" in left[0][1]
    assert relative(got, oracle(model)[0]) < BOUND
    assert relative(more, oracle(model, masked=False)[1]) < BOUND < relative(more, oracle(model)[1])


def test_who_else_reads_it_and_zeros_that_change(model):
    model.between = lambda _, h: (h + 1, h * 1.0)
    with torch.no_grad():
        (got, more), targets, left = rewritten(model)
    assert not {gate_mask, masked_gemv, masked_rows}.intersection(targets)
    assert [name for name, _ in left] == ["down"]
    dense = oracle(model, masked=False)
    assert relative(got, dense[0]) < BOUND and relative(more, dense[1]) < BOUND


def test_a_scale_behind_the_product_is_not_its_gate(model):
    """The first product in front of down is not that of gate and up."""
    model.between = lambda self, h: (h * self.scale) * self.scale
    with torch.no_grad():
        got, _, left = rewritten(model)
    assert left == []
    assert relative(got, oracle(model)) < BOUND


def test_gradients_through_dropout(model):
    model.between = dropped
    right = oracle(model).square().mean().detach()
    got = rewritten(model)[0].square().mean()
    got.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {"gate.weight", "up.weight", "down.weight"} <= grads.keys()
    assert float(got.detach()) == pytest.approx(float(right), rel=1e-12)
    step = 1e-6
    with torch.no_grad():  # against differences of the oracle, which shares no autograd rule
        for name in ("up.weight", "down.weight"):
            weight, direction = dict(model.named_parameters())[name], torch.randn_like(grads[name])
            values = []
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * step)
                values.append(float(oracle(model).square().mean()))
                weight.sub_(direction, alpha=sign * step)
            slope = (values[0] - values[1]) / (2 * step)
            assert float((grads[name] * direction).sum()) == pytest.approx(slope, rel=1e-6)
