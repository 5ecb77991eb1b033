"""Fused forms of rana::masked_gemv: a residual, one half's activation times the other half, and pointwise users that Inductor
fuses into the C++ template."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import gelu, silu

from rana_fx.errors import BadOperand, UnknownChoice
from rana_fx.formats import pack, unpack
from rana_fx.kernels.ops import implementation, masked_gemv, masked_gemv_add, masked_gemv_gated
from rana_fx.kernels.reference import ACTIVATIONS
from rana_fx.kernels.triton.config import Config, Launch
from tests.support.implementations import EAGER, FEW, GEMV_CONFIGS, kernels
from tests.support.inductor import FALLBACK, GEMV, calls, compiled, each, poisoned
from tests.support.products import STRIDES, Product, product_of, products, strided

# ---- the reference and Triton's kernels: a residual, an activation


def fused(who, device, case, data, **form):
    """The masked product with a residual or an activation; by Triton in any config."""
    if who == "triton":
        return kernels("masked_gemv", device).masked_gemv(*case.operands, **form, config=data.draw(GEMV_CONFIGS))
    op = masked_gemv_add if "residual" in form else masked_gemv_gated
    with implementation(who):
        return op(*case.operands, 0.5, *form.values())


@pytest.mark.parametrize("bits", [16, 8, 4])
@EAGER
@FEW
@given(data=st.data())
def test_residual(who, device, bits, data):
    for _ in range(8):
        case = data.draw(products(bits=bits)).to(device)
        shape, dtype = (case.v.shape[0], case.sums()[0].shape[1]), data.draw(st.sampled_from([case.v.dtype, torch.float32]))
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        residual = strided(values, data.draw(STRIDES))
        case.check(fused(who, device, case, data, residual=residual), residual)


@EAGER
@FEW
@given(data=st.data())
def test_activation(who, device, data):
    """Each one in each storage; of large arguments, and with fixed shapes, below."""
    for name, bits in itertools.product(ACTIVATIONS, (16, 16, 8, 4)):
        case = data.draw(products(bits=bits, halves=True)).to(device)
        case.check_gated(fused(who, device, case, data, activation=name), ACTIVATIONS[name])


# ---- Triton: the kernels' own activations, and operands that are refused


@pytest.fixture
def launch(device):
    return kernels("masked_gemv", device).masked_gemv


def test_every_activation_has_a_kernel():
    pytest.importorskip("triton")
    from rana_fx.kernels.gemv import ACTIVATION_CODES

    assert set(ACTIVATION_CODES) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_large_arguments(launch, device, name):
    """No intermediate value overflows."""
    v = torch.tensor([[1.0]], device=device)
    gate = torch.tensor([-3e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 3e4], device=device)
    weight = torch.cat([gate, torch.ones_like(gate)])[None]
    y = launch(v, torch.zeros(1, device=device), weight, activation=name)
    torch.testing.assert_close(y[0].double(), ACTIVATIONS[name](gate.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("bits", "tokens"), [(16, 1), (8, 3), (4, 6)])
def test_activation_of_one_half_times_the_other(launch, device, name, bits, tokens):
    generator = torch.Generator().manual_seed(tokens)
    weight, scale = torch.randn(33, 2 * 192, generator=generator), None
    if bits < 16:
        weight, scale = pack(weight, bits)
    v, bias = torch.randn(tokens, 33, generator=generator), torch.randn(384, generator=generator)
    case = Product(v, torch.full((33,), 0.5), weight, scale, bias).to(device)
    plain = torch.where(case.v.square() >= case.tau, case.v, 0).double() @ unpack(case.weight, case.scale, torch.float64)
    gate, up = (plain + case.bias).chunk(2, -1)
    config = Config(3, block_n=128, block_m=2, warps=1)
    y = launch(case.v, case.tau, case.weight, case.bias, case.scale, activation=name, config=config)
    assert y.shape == (tokens, 192)
    # fp32 sums of 33 terms of size 1, then exp
    torch.testing.assert_close(y.double(), ACTIVATIONS[name](gate) * up, rtol=1e-4, atol=1e-4)


def test_wrong_bias_and_activation_are_refused(launch, device):
    v, tau, weight = (torch.ones(shape, device=device) for shape in ((1, 3), (3,), (3, 5)))
    with pytest.raises(BadOperand, match="bias"):
        launch(v, tau, weight, torch.ones(4, device=device))
    with pytest.raises(UnknownChoice, match="gelu_tanh"):
        launch(v, tau, weight, activation="tanh")
    with pytest.raises(BadOperand, match="a multiple of 2"):
        launch(v, tau, weight, activation="silu")
    with pytest.raises(BadOperand, match="residual"):
        launch(v, tau, weight, residual=torch.ones(5, device=device))
    with pytest.raises(BadOperand, match="no activation"):
        launch(v, tau, weight, residual=torch.ones(1, 5, device=device), activation="silu")
    with pytest.raises(BadOperand, match="counters"):
        launch(v, tau, weight, how=Launch(traced=True))


# ---- C++: users that the scheduler fuses into the template


def _gated(v, tau, weight, bias, scale):
    gate, up = masked_gemv(v, tau, weight, bias, scale).chunk(2, -1)
    return silu(gate) * up


def _gelu(v, tau, weight, bias, scale):
    return gelu(masked_gemv(v, tau, weight, bias, scale), approximate="tanh")


def _two_users(v, tau, weight, bias, scale):
    y = masked_gemv(v, tau, weight, bias, scale)
    return torch.relu(y), y.sum(-1)


def _residual(v, tau, weight, bias, scale):
    return masked_gemv(v[None], tau, weight, bias, scale) * 0.5 + v.sum(-1, keepdim=True)[None]


def _heads(v, tau, weight, bias, scale):
    return silu(masked_gemv(v, tau, weight, bias, scale).unflatten(-1, (4, -1)).transpose(0, 1)) + 1


USERS = (_gated, _gelu, _two_users, _residual, _heads)


def test_fused_users():
    """The scheduler fuses pointwise users into any template; a template that ignores them would give wrong results."""
    kinds = ((torch.float32, 16), (torch.float32, 8), (torch.bfloat16, 4), (torch.bfloat16, 16))
    # in one graph, with different operands: equal matmuls would be computed once
    cases = [
        (user, product_of(3, 61, 128, dtype, bits=bits, seed=seed).operands)
        for dtype, bits in kinds
        for seed, user in enumerate(USERS)
    ]

    def users(*flat):
        return [user(*flat[5 * index : 5 * index + 5]) for index, (user, _) in enumerate(cases)]

    with poisoned():
        results, code = compiled(users, *itertools.chain(*(operands for _, operands in cases)))
    assert calls(code, GEMV) == len(cases)
    assert FALLBACK not in code
    for (user, (v, tau, weight, bias, scale)), got in zip(cases, results, strict=True):
        right = user(v.double(), tau, unpack(weight, scale, torch.float64), bias.double(), None)
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, right)), strict=True):
            error = (a.double() - b).norm() / b.norm()
            assert error < 4 * torch.finfo(v.dtype).eps * math.sqrt(61), (user.__name__, v.dtype, weight.dtype)


def test_epilogue_is_in_the_same_kernel():
    cases = [product_of(1, 61, 128, torch.float32, bits=bits).operands for bits in (16, 8, 4)]
    _, code = each(lambda *args: silu(masked_gemv(*args)), cases)
    assert code.count(GEMV) == len(cases)
    assert code.count('extern "C"') == len(cases)  # one kernel each: compaction, product, bias and activation
