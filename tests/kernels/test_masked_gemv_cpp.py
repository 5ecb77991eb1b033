"""The C++ template through Inductor: numerics, everything that may be fused into it, and where it steps aside."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import silu

from rana_fx.kernels.masked_gemv_cpp import MAX_TOKENS
from rana_fx.kernels.ops import masked_gemv
from rana_fx.passes import lower

MARK = "// rana_masked_gemv"


def compiled(function, *args, **settings):
    lower.register()
    torch.compiler.reset()
    got, (code, *_) = run_and_get_code(torch.compile(function, **settings), *args)
    return got, code


def inputs(tokens, ranks, outputs, dtype, *, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(tokens, ranks, generator=generator).to(dtype)
    # a threshold per rank around the quantile that gives the density; 0 keeps all, infinity none
    cut = {0.0: math.inf, 1.0: 0.0}.get(density, float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - density / 2))) ** 2)
    tau = torch.full((ranks,), cut) * (0.5 + torch.rand(ranks, generator=generator))
    tau = torch.where(tau.isnan(), torch.zeros(()), tau)
    weight = (torch.randn(ranks, outputs, generator=generator) / math.sqrt(ranks)).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    return v, tau, weight, bias


def exact(v, tau, weight, bias=None):
    """fp64, and per output the sum of magnitudes that rounding is proportional to."""
    masked = v.double() * (v.float().square() >= tau)
    y = masked @ weight.double()
    scale = masked.abs() @ weight.double().abs()
    return (y, scale) if bias is None else (y + bias.double(), scale + bias.double().abs())


def bound(dtype, ranks):
    # products are exact in fp32 for 16-bit inputs; eight chains of fused multiply-adds, then one rounding to the output's dtype
    return torch.finfo(torch.float32).eps * (ranks + 8) + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)


@settings(max_examples=12)
@given(
    st.integers(1, MAX_TOKENS),
    st.sampled_from([1, 7, 31, 64, 97, 250]),
    st.sampled_from([1, 5, 16, 127, 513, 1031]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_matches_fp64(tokens, ranks, outputs, dtype, density, strided, seed):
    v, tau, weight, bias = inputs(tokens, ranks, outputs, dtype, density=density, seed=seed)
    if strided:  # an offset, rows and columns apart
        v = torch.cat([v, v], 1)[:, 1::2]
        v = torch.cat([v, v], 1)[:, :ranks]
        weight = torch.cat([weight, weight], 1)[:, outputs:]
    got, code = compiled(masked_gemv, v, tau, weight, bias)
    y, scale = exact(v, tau, weight, bias)
    assert MARK in code
    assert got.dtype == dtype
    assert ((got.double() - y).abs() <= bound(dtype, ranks) * scale + 1e-30).all()


def test_two_runs_are_equal_to_the_bit():
    v, tau, weight, bias = inputs(3, 250, 2000, torch.float32)
    lower.register()
    run = torch.compile(masked_gemv)
    first = run(v, tau, weight, bias)
    assert all(torch.equal(first, run(v, tau, weight, bias)) for _ in range(3))


def _gated(v, tau, weight, bias):
    gate, up = masked_gemv(v, tau, weight, bias).chunk(2, -1)
    return silu(gate) * up


def _two_users(v, tau, weight, bias):
    y = masked_gemv(v, tau, weight, bias)
    return torch.relu(y), y.sum(-1)


def _residual(v, tau, weight, bias):
    return masked_gemv(v[None], tau, weight, bias) * 0.5 + v.sum(-1, keepdim=True)[None]


def _heads(v, tau, weight, bias):
    return silu(masked_gemv(v, tau, weight, bias).unflatten(-1, (4, -1)).transpose(0, 1)) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [_gated, _two_users, _residual, _heads])
def test_fused_users(function, dtype):
    """The scheduler fuses pointwise users into any template, also into one that ignores them and leaves garbage behind."""
    v, tau, weight, bias = inputs(3, 61, 128, dtype)
    got, code = compiled(function, v, tau, weight, bias)
    right = function(v.double(), tau, weight.double(), bias.double())
    assert MARK in code
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, right)), strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < 4 * torch.finfo(dtype).eps * math.sqrt(61)


def test_epilogue_is_in_the_same_kernel():
    v, tau, weight, bias = inputs(1, 61, 128, torch.float32)
    _, code = compiled(lambda *args: silu(masked_gemv(*args)), v, tau, weight, bias)
    assert code.count(MARK) == 1
    assert code.count('extern "C"') == 1  # one kernel: compaction, product, bias and activation


def test_steps_aside():
    """More tokens, or a weight whose rows are not contiguous, make it a matrix product; so does a varying token count."""
    many, tau, weight, bias = inputs(MAX_TOKENS + 1, 31, 64, torch.float32)
    cases = [(many, weight), (many[:1], weight.t().contiguous().t())]
    for v, w in cases:
        got, code = compiled(masked_gemv, v, tau, w, bias)
        assert MARK not in code
        y, scale = exact(v, tau, w, bias)
        assert ((got.double() - y).abs() <= bound(torch.float32, 31) * scale).all()
    got, code = compiled(masked_gemv, many[:3], tau, weight, bias, dynamic=True)
    assert MARK not in code
    assert torch.allclose(got, exact(many[:3], tau, weight, bias)[0].float(), rtol=1e-5, atol=1e-5)


def test_gradients_through_the_template():
    v, tau, weight, bias = inputs(2, 31, 64, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (v, weight, bias)]
    got, code = compiled(lambda a, w, b: masked_gemv(a, tau, w, b).square().sum(), *leaves)
    got.backward()
    right = [x.double().requires_grad_() for x in (v, weight, bias)]
    kept = v.square() >= tau
    ((right[0] * kept) @ right[1] + right[2]).square().sum().backward()
    for a, b in zip(leaves, right, strict=True):
        assert (a.grad.double() - b.grad).norm() < 1e-5 * b.grad.norm()
