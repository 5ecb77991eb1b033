"""act(first half) * second half of a masked matmul is recognised in any form, by values; other graphs are unchanged."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rana_fx.formats import pack, unpack
from rana_fx.kernels.ops import masked_gemv, masked_gemv_gated
from rana_fx.kernels.reference import ACTIVATIONS
from tests.support.graphs import NONE, fused, mask, ops_of
from tests.support.products import DTYPES, assert_close

RANKS, HALF = 24, 40


def tanh_gelu(x, constant=(2 / math.pi) ** 0.5):
    return 0.5 * x * (1.0 + torch.tanh(constant * (x + 0.044715 * torch.pow(x, 3.0))))


SPELLINGS = {
    "silu": {
        "torch": F.silu,
        "sigmoid": lambda x: x * torch.sigmoid(x),
        "exp": lambda x: x / (1 + torch.exp(-x)),
        "tanh": lambda x: 0.5 * x * (1 + torch.tanh(x / 2)),
        "wide": lambda x: F.silu(x.float()).to(x.dtype),
    },
    "gelu_tanh": {
        "torch": lambda x: F.gelu(x, approximate="tanh"),
        "pow": tanh_gelu,
        "eight digits": lambda x: tanh_gelu(x, 0.79788456),
        "fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        "sigmoid": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)),
    },
    "gelu": {
        "torch": F.gelu,
        "erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
        "erfc": lambda x: 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5)),
    },
    "relu": {
        "torch": F.relu,
        "clamp": lambda x: x.clamp(min=0),
        "mask": lambda x: x * (x > 0),
        "cast mask": lambda x: x * (x > 0).to(x.dtype),
        "abs": lambda x: (x + x.abs()) / 2,
    },
}

HALVES = {
    "chunk": lambda y: y.chunk(2, -1),
    "split": lambda y: torch.split(y, [HALF, HALF], -1),
    "slice": lambda y: (y[..., :HALF], y[..., HALF:]),
    "narrow": lambda y: (y.narrow(-1, 0, HALF).contiguous(), y.narrow(-1, HALF, HALF).contiguous()),
    "unbind": lambda y: y.view(*y.shape[:-1], 2, HALF).unbind(-2),
    "index": lambda y: (y.reshape(-1, 2, HALF)[:, 0], y.reshape(-1, 2, HALF)[:, 1]),
    "transposed": lambda y: y.unflatten(-1, (2, HALF)).transpose(-1, -2).unbind(-1),
    "flat": lambda y: (y.view(-1, 2 * HALF)[:, :HALF].clone(), y.view(-1, 2 * HALF)[:, HALF:].clone()),
}


def operands(dtype=torch.float32, lead=(1, 1), columns=2 * HALF):
    v, w = torch.randn(*lead, RANKS).to(dtype), (torch.randn(RANKS, columns) / RANKS**0.5).to(dtype)
    return v, mask(RANKS), w, torch.randn(columns).to(dtype)


def check(got, name, v, tau, w, bias):
    """Against fp64. The activations' slopes are at most 1.13."""
    kept = torch.where(tau == 0, v.double(), 0)
    first, second = (kept @ w.double() + bias.double()).chunk(2, -1)
    sums = (kept.abs() @ w.double().abs() + bias.double().abs()).chunk(2, -1)
    acted = ACTIVATIONS[name](first)
    exact = acted * second
    magnitude = 1.13 * sums[0] * second.abs() + acted.abs() * sums[1] + exact.abs()
    assert_close("y", got, exact.reshape(got.shape), magnitude.reshape(got.shape), terms=RANKS + 1)


def combinations():
    """Every form of the activation and every way to take halves, not all pairs."""
    spellings = [(name, key) for name, known in SPELLINGS.items() for key in known]
    return [(*spelling, halves) for spelling, halves in zip(spellings, itertools.cycle(HALVES), strict=False)]


@pytest.mark.parametrize(("name", "spelling", "halves"), combinations())
def test_every_spelling_is_known(name, spelling, halves):
    act = SPELLINGS[name][spelling]

    def gated(*given):
        first, second = HALVES[halves](masked_gemv(*given))
        return second * act(first) if halves in ("split", "flat") else act(first) * second

    given = operands(torch.bfloat16, (1, 3))
    module, counts = fused(gated, *given)
    assert counts == NONE | {"gated": 1}
    assert ops_of(module) == ["masked_gemv_gated"]
    assert sum(node.op == "call_function" for node in module.graph.nodes) == 1 + (halves in ("index", "flat"))
    node = next(node for node in module.graph.nodes if node.op == "call_function")
    assert node.args[-1] == name
    got = module(*given)
    assert got.shape == gated(*given).shape
    check(got, name, *given)


@settings(max_examples=20)
@given(data=st.data())
def test_shapes_and_dtypes(data):
    half = data.draw(st.sampled_from([1, 2, 3, 7, 31, 97, 2000]))
    name = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    lead = data.draw(st.sampled_from([(), (1,), (4,), (1, 3), (2, 2)]))
    given = operands(data.draw(st.sampled_from(DTYPES)), lead, 2 * half)

    def gated(*given):
        first, second = masked_gemv(*given).chunk(2, -1)
        return ACTIVATIONS[name](first) * second

    module, counts = fused(gated, *given)
    assert counts == NONE | {"gated": 1}
    got = module(*given)
    assert got.shape == (*lead, half)
    check(got, name, *given)


GROUPINGS = {
    "around": lambda g, u: g * (torch.sigmoid(g) * u),
    "quotient": lambda g, u: (g * u) / (1 + torch.exp(-g)),
    "wide": lambda g, u: (F.silu(g.float()) * u.float()).to(g.dtype),
    "doubled": lambda g, u: (2 * F.silu(g)) * (u / 2),
}


@pytest.mark.parametrize("name", GROUPINGS)
def test_factors_may_be_grouped_in_any_way(name):
    given = operands(torch.bfloat16)
    module, counts = fused(lambda *given: GROUPINGS[name](*masked_gemv(*given).chunk(2, -1)), *given)
    assert counts == NONE | {"gated": 1}
    check(module(*given), "silu", *given)


def test_what_follows_stays():
    given = operands(torch.bfloat16)

    def gated(*given):
        first, second = masked_gemv(*given).chunk(2, -1)
        h = F.silu(first) * second
        return h.float() * 2, h.view(HALF)  # the cast is no part of it, nor is a factor of both

    module, counts = fused(gated, *given)
    assert counts == NONE | {"gated": 1}
    wide, flat = module(*given)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.view(HALF), 2 * flat.float())
    check(flat.view(1, 1, HALF), "silu", *given)


def halves_then(function):
    return lambda *given: function(*masked_gemv(*given).chunk(2, -1))


def of_y(function):
    return lambda *given: function(masked_gemv(*given))


LEFT = {
    "quick gelu": halves_then(lambda g, u: g * torch.sigmoid(1.702 * g) * u),
    "squared relu": halves_then(lambda g, u: F.relu(g).square() * u),
    "relu6": halves_then(lambda g, u: F.relu6(g) * u),
    "zero for NaN": halves_then(lambda g, u: torch.fmax(g, (g > g).to(g.dtype)) * u),
    "leaky relu": halves_then(lambda g, u: F.leaky_relu(g, 1e-4) * u),
    "sigmoid": halves_then(lambda g, u: torch.sigmoid(g) * u),
    "no activation": halves_then(lambda g, u: g * u),
    "clamped": halves_then(lambda g, u: F.silu(g.clamp(max=7.0)) * u),
    "clamped far out": halves_then(lambda g, u: F.silu(g.clamp(max=30_000.0)) * u),
    "shifted gate": halves_then(lambda g, u: F.silu(g + 1e-3) * u),
    "scaled": halves_then(lambda g, u: 1.01 * F.silu(g) * u),
    "a factor within": halves_then(lambda g, u: F.silu(g) * (u * 1.00001)),
    "one more": halves_then(lambda g, u: F.silu(g) * (u + 1)),
    "factor clamped far out": halves_then(lambda g, u: F.silu(g) * u.clamp(max=30_000.0)),
    "clamped factor": halves_then(lambda g, u: F.silu(g) * u.clamp(-7, 7)),
    "activated second": halves_then(lambda g, u: g * F.silu(u)),
    "both activated": halves_then(lambda g, u: F.silu(g) * F.silu(u)),
    "sum": halves_then(lambda g, u: F.silu(g) + u),
    "one half": halves_then(lambda g, u: F.silu(g) * g),
    "eight bits": halves_then(lambda g, u: F.silu(g).to(torch.float8_e4m3fn).to(g.dtype) * u),
    "integers": halves_then(lambda g, u: F.silu(g).to(torch.int32).to(g.dtype) * u),
    "noise": halves_then(lambda g, u: F.silu(g) * (u + 1e-9 * torch.rand_like(u))),
    "dropout": halves_then(lambda g, u: F.dropout(F.silu(g), 0.5) * u),
    "over columns": halves_then(lambda g, u: F.silu(g - g.mean(-1, keepdim=True)) * u),
    "other factor": lambda v, tau, w, c: F.silu(masked_gemv(v, tau, w, c)[..., :HALF]) * c[:HALF],
    "another reader of y": of_y(lambda y: (F.silu(y[..., :HALF]) * y[..., HALF:], y + 1)),
    "another reader of the gate": halves_then(lambda g, u: (F.silu(g) * u, g)),
    "another reader of the activation": halves_then(lambda g, u: ((a := F.silu(g)) * u, a)),
    "another reader of the factor": halves_then(lambda g, u: (F.silu(g) * u, u.sum())),
    "twisted": of_y(lambda y: F.silu(y[..., ::2]) * y[..., 1::2]),
    "shifted columns": of_y(lambda y: F.silu(y[..., :HALF]) * y[..., HALF - 1 : -1]),
    "overlapping columns": of_y(lambda y: F.silu(y[..., :HALF]) * y[..., 1 : HALF + 1]),
    "reversed columns": of_y(lambda y: F.silu(y[..., :HALF].flip(-1)) * y[..., HALF:].flip(-1)),
    "less than halves": of_y(lambda y: F.silu(y[..., : HALF - 1]) * y[..., HALF:-1]),
    "the larger part": of_y(lambda y: F.silu(y[..., : HALF + 1]) * y[..., HALF - 1 :]),
    "tokens exchanged": of_y(lambda y: F.silu(y[..., :HALF]) * y.flip(0)[..., HALF:]),
    "outer product": halves_then(lambda g, u: F.silu(g).unsqueeze(-1) * u.unsqueeze(-2)),
}


@pytest.mark.parametrize("name", LEFT)
def test_everything_else_is_left(name):
    given = operands(lead=(2,))
    module, counts = fused(LEFT[name], *given)
    assert counts == NONE
    assert ops_of(module) == ["masked_gemv"]


def test_a_wider_result_is_left():
    given = operands(torch.bfloat16)
    module, counts = fused(halves_then(lambda g, u: F.silu(g.float()) * u.float()), *given)
    assert counts == NONE
    assert module(*given).dtype == torch.float32


def test_odd_columns_are_left():
    given = operands(columns=2 * HALF + 1)
    assert fused(of_y(lambda y: F.silu(y[..., :HALF]) * y[..., HALF + 1 :]), *given)[1] == NONE


@pytest.mark.parametrize(
    ("bits", "half", "count"), [(8, 40, 1), (8, 41, 0), (8, 42, 0), (4, 128, 1), (4, 64, 1), (4, 96, 0), (4, 40, 0)]
)
def test_halves_of_quantised_weights_are_whole_words_and_groups(bits, half, count):
    v, tau, w, _ = operands(columns=2 * half)
    w, scale = pack(w, bits, 64)

    def gated(v, tau, w, scale):
        first, second = masked_gemv(v, tau, w, None, scale).chunk(2, -1)
        return F.silu(first) * second

    module, counts = fused(gated, v, tau, w, scale)
    assert counts == NONE | {"gated": count}
    check(module(v, tau, w, scale), "silu", v, tau, unpack(w, scale), torch.zeros(2 * half))


def test_operands_by_name_are_passed_on():
    v, tau, w, c = operands()

    def gated(v, tau, w, c):
        first, second = masked_gemv(v, tau=tau, weight=w, bias=c, density=0.25).chunk(2, -1)
        return F.silu(first) * second

    module, counts = fused(gated, v, tau, w, c)
    assert counts == NONE | {"gated": 1}
    node = next(node for node in module.graph.nodes if node.target is masked_gemv_gated)
    assert node.args[4:] == (None, 0.25, "silu")
    check(module(v, tau, w, c), "silu", v, tau, w, c)
