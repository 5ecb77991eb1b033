"""Sizes at the edge: no token, one, a number that varies or depends on data; a feature of one; in every mode of ``prefill``."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rana_fx
from rana_fx.evaluation.measure import measuring
from rana_fx.formats import pack, unpack
from rana_fx.kernels.ops import (
    implementation,
    masked_gemv,
    masked_gemv_add,
    masked_gemv_gated,
    masked_gemv_normed,
    masked_gemv_parts,
    masked_rows,
    normed_router,
    router,
)
from rana_fx.passes.runner import run
from rana_fx.runtime.prefill import MODES
from tests.support.adapted import relative
from tests.support.by_hand import outputs_by_hand
from tests.support.inductor import GEMV, calls, compiled

WIDTH, FFN = 16, 40
RECIPES = ("paper", "teal", "cats", "static")
AS_REWRITTEN = pytest.mark.usefixtures("graphs_as_rewritten")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A mixture by a loop: how many tokens an expert has depends on the data. ``by_mask``: selected by a boolean mask."""

    def __init__(self, count=3, *, by_mask=False):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, count), nn.ModuleList(Mlp() for _ in range(count))
        self.by_mask = by_mask

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        chosen, out = self.router(rows).argmax(-1), torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            if self.by_mask:
                out = out.masked_scatter((chosen == index)[:, None], expert(rows[chosen == index]))
            else:
                at = torch.nonzero(chosen == index).squeeze(-1)
                out = out.index_add(0, at, expert(rows[at]))
        return out.view(x.shape)


@functools.cache
def _adapted_experts(count, by_mask):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Experts(count, by_mask=by_mask)
        adapted(model)
    return model


def adapted_experts(count=3, *, by_mask=False):
    """A model of its own with a plan of recipe ``paper``."""
    return copy.deepcopy(_adapted_experts(count, by_mask))


def adapted(model, recipe="paper", *, shape=(32, WIDTH)):
    batches = [(torch.randn(shape),) for _ in range(8)]
    return rana_fx.adapt(model.eval(), batches, budget=0.8, recipe=recipe, progress=False)


def masked(model, *batches):
    return outputs_by_hand(model, *((x,) for x in batches))


def mixed(recipes):
    """A model with an MLP for each recipe: what all of them need, in one graph."""
    model = nn.Sequential(*(Mlp() for _ in recipes))
    found = []
    for index, recipe in enumerate(recipes):
        plan = adapted(model, recipe)
        found += [adapter for adapter in plan.adapters if adapter.sites[0].startswith(f"{index}.")]
        rana_fx.detach(model)
    assert {adapter.sites[0][0] for adapter in found} == {str(index) for index in range(len(recipes))}
    rana_fx.attach(model, replace(plan, adapters=tuple(found)))
    return model


def test_no_token():
    """Flat and in a batch; then some tokens of the same compiled function, then none again."""
    model = mixed(RECIPES)
    fast = torch.compile(model, backend=rana_fx.backend)
    full = torch.randn(3, WIDTH)
    (expected,) = masked(model, full)
    with torch.no_grad():
        for shape in ((0, WIDTH), (2, 0, WIDTH), (0, 5, WIDTH)):
            assert fast(torch.randn(shape)).shape == shape
        assert relative(fast(full), expected) < 1e-5
        assert fast(torch.randn(0, WIDTH)).shape == (0, WIDTH)


def test_no_token_with_gradients():
    model = Mlp()
    adapted(model)
    x = torch.randn(0, WIDTH, requires_grad=True)
    torch.compile(model, backend=rana_fx.backend)(x).sum().backward()
    assert x.grad.shape == (0, WIDTH)
    assert all(float(parameter.grad.abs().sum()) == 0 for parameter in model.parameters() if parameter.grad is not None)


@AS_REWRITTEN
@pytest.mark.parametrize("mode", MODES)
def test_no_token_in_every_mode(mode):
    model = Mlp()
    adapted(model)
    with torch.no_grad():
        fast = torch.compile(model, backend=rana_fx.backend, options={"prefill": mode})
        for tokens in (0, 40, 1, 0):
            assert fast(torch.randn(tokens, WIDTH)).shape == (tokens, WIDTH)


def operands(tokens, columns, rows, bits):
    """Of every operation that takes weights in so many bits: (operation, operands)."""

    def stored(*shape):
        return (torch.randn(shape), None) if bits == 16 else pack(torch.randn(shape), bits)

    v, tau, x = torch.randn(tokens, rows), torch.full((rows,), 0.1), torch.randn(tokens, columns)
    weight, scale = stored(rows, columns)
    back, back_scale = stored(rows, columns)
    yield masked_gemv, (v, tau, weight, torch.randn(columns), scale)
    yield masked_gemv_add, (v, tau, weight, None, scale, 0.5, torch.randn(tokens, columns))
    yield router, (x, back, back_scale)
    yield normed_router, (x, torch.randn(columns), back, back_scale, 1e-5, 0.0)
    if columns % 128 == 0:
        yield masked_gemv_gated, (v, tau, weight, None, scale, 0.5, "gelu")
        yield masked_gemv_normed, (v, torch.randn(rows), tau, weight, None, scale, 0.5, "gelu", 1e-5, 0.0)
    if bits == 16:
        yield masked_gemv_parts, (v, [tau, tau * 0], [weight, torch.randn(rows, 3)], [], 0.5)
        gate = torch.where(torch.rand(tokens, columns) < 0.5, 1.0, 0.0)
        yield masked_rows, (torch.randn(tokens, rows), gate, torch.randn(columns, rows), torch.randn(columns), 0.01)


def wide(value):
    if isinstance(value, list):
        return [wide(part) for part in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def exact(op, given):
    """By the reference in fp64, of what is stored."""
    names = [argument.name for argument in op._schema.arguments]
    by_name = dict(zip(names, given, strict=False))
    if by_name.get("scale") is not None:
        by_name |= {"weight": unpack(by_name["weight"], by_name["scale"], torch.float64), "scale": None}
    with implementation("reference"):
        return op(**{name: wide(value) for name, value in by_name.items()})


@pytest.mark.parametrize("sizes", [((0, 128, 24),), ((1, 128, 1), (3, 2, 1), (12, 1, 1))], ids=["no token", "one of a size"])
def test_operations(device, sizes):
    """No token, one column, one row; in every storage; in eager mode, by the kernels and compiled, in one graph."""
    given = []
    for tokens, columns, rows in sizes:
        torch.manual_seed(tokens)
        # columns of 4 bits are pairs
        every = (16, 8) if columns % 2 else (16, 8, 4)
        with device:
            given += [(op, args) for bits in every for op, args in operands(tokens, columns, rows, bits)]
    right = [exact(op, args) for op, args in given]
    for name in ("auto", "reference", "triton"):
        with implementation(name):
            for (op, args), expected in zip(given, right, strict=True):
                assert_close(op(*args), expected, f"{op} by {name}")

    def everything():
        return [op(*args) for op, args in given]

    results, code = compiled(everything)
    assert calls(code, GEMV) == 0 or all(tokens for tokens, _, _ in sizes)
    for (op, _), got, expected in zip(given, results, right, strict=True):
        assert_close(got, expected, f"{op}, compiled")


def assert_close(got, expected, name):
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(
    ("mode", "by_mask", "lowered"),
    [("masked", False, True), *((mode, by_mask, False) for mode in MODES for by_mask in (False, True))],
)
def test_experts_in_one_graph(mode, by_mask, lowered, request):
    """Sizes that depend on data cannot be guarded on. All experts have tokens, one has all, none has any."""
    if not lowered:
        request.getfixturevalue("graphs_as_rewritten")
    model = adapted_experts(2 if lowered else 3, by_mask=by_mask)
    some = torch.randn(12, WIDTH)
    batches = [some, some[:1], torch.randn(0, WIDTH), torch.randn(2, 30, WIDTH)]
    adapts, dense = masked(model, *batches), [model(x).detach() for x in batches]
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = torch.compile(model, backend=rana_fx.backend, options={"prefill": mode}, fullgraph=True)
        for x, masks, plain in zip(batches, adapts, dense, strict=True):
            got = fast(x)
            assert got.shape == x.shape
            if x.numel():
                # of one token an expert has one at most, which is a bound that the graph knows
                expected = plain if mode == "dense" and x.numel() > WIDTH else masks
                # "cheapest" leaves some linears dense
                assert relative(got, expected) < (1e-5 if mode != "cheapest" else 1)


def test_why_linears_of_an_expert_stay_dense():
    model, reasons = adapted_experts(), []

    def recording(gm, example_inputs):
        reasons.extend(declined.reason for declined in run(gm, example_inputs, prefill="dense").matches.declined)
        return gm.forward

    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(model, backend=recording, fullgraph=True)(torch.randn(12, WIDTH))
    assert reasons.count("prefill=dense, and how many tokens it reads depends on data") == 9


@AS_REWRITTEN
def test_experts_between_graph_breaks():
    """As PyTorch compiles them by default: an expert without tokens is a graph of its own."""
    model = adapted_experts()
    batches = [torch.randn(12, WIDTH), torch.randn(1, WIDTH), torch.randn(1, 1, WIDTH)]
    with measuring(model) as meter:
        measured = [meter.run((x,)) for x in batches]
    expected = masked(model, *batches)
    assert all(relative(one, right) < 1e-5 for one, right in zip(measured, expected, strict=True))
    with torch.no_grad():
        fast = torch.compile(model, backend=rana_fx.backend)
        for x, right in zip(batches, expected, strict=True):
            assert relative(fast(x), right) < 1e-5


def test_a_bounded_number_that_depends_on_data():
    """The kernel takes it, also where it turns out to be zero."""
    tau, weight = torch.full((24,), 0.3), torch.randn(24, 130)

    def some(v, mask, tau, weight):
        rows = v[mask]
        torch._check(rows.shape[0] <= 4)
        return masked_gemv(rows, tau, weight)

    v = torch.randn(6, 24)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for kept in (3, 0, 1, 4):
            mask = torch.arange(6) < kept
            got, code = compiled(some, v, mask, tau, weight)
            assert calls(code, GEMV) == 1
            masked_v = torch.where(v[:kept].square() < tau, 0.0, v[:kept]).double()
            assert_close(got, masked_v @ weight.double(), f"{kept} of 6")


def test_marked_dynamic():
    """One graph for every batch and length above one."""
    model = mixed(["paper", "cats"])
    batches = [torch.randn(2, 3, WIDTH), torch.randn(7, 11, WIDTH), torch.randn(3, 2, WIDTH)]
    expected = masked(model, *batches)
    seen = []

    def counting(gm, example_inputs, **more):
        seen.append(gm)
        return rana_fx.backend(gm, example_inputs, **more)

    fast = torch.compile(model, backend=counting)
    with torch.no_grad():
        for x, right in zip(batches, expected, strict=True):
            x = x.clone()
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            assert relative(fast(x), right) < 1e-5
    assert len(seen) == 1


@AS_REWRITTEN
def test_linears_of_one_feature():
    """One input, one output, one hidden neuron."""

    class Thin(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(WIDTH, 1), nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))

    for recipe in ("static", "dense", "teal"):
        model = Thin()
        adapted(model, recipe)
        x = torch.randn(3, WIDTH)
        (expected,) = masked(model, x)
        with torch.no_grad():
            assert relative(torch.compile(model, backend=rana_fx.backend)(x), expected) < 1e-5
        rana_fx.detach(model)
        torch.compiler.reset()
