"""The C++ template of the masked matmul through Inductor: numerics, fusions, and cases that it declines."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, silu

from rana_fx.formats import pack, unpack
from rana_fx.kernels import reference
from rana_fx.kernels.cpp.template import MAX_TOKENS
from rana_fx.kernels.ops import masked_gemv
from rana_fx.passes import lower
from tests.support.inductor import GEMV, calls, check_threads_change_no_bit, compiled, each, poisoned
from tests.support.products import Product, assert_close, every_number, products

FALLBACK = "torch.ops.rana"
BITS = (16, 8, 4)


def operands(tokens, ranks, outputs, dtype, *, bits=16, density=0.5, seed=0):
    """v, tau, weight, bias, scale; a threshold per rank around the quantile that gives the density."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(tokens, ranks, generator=generator).to(dtype)
    cut = {0.0: math.inf, 1.0: 0.0}.get(density, float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - density / 2))) ** 2)
    tau = (torch.full((ranks,), cut) * (0.5 + torch.rand(ranks, generator=generator))).nan_to_num(nan=0.0, posinf=math.inf)
    weight = (torch.randn(ranks, outputs, generator=generator) / math.sqrt(ranks)).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    weight, scale = (weight, None) if bits == 16 else every_number(*pack(weight, bits), generator)
    return v, tau, weight, bias, scale


@pytest.mark.parametrize("bits", [16, 8, 4])
@settings(max_examples=2)
@given(data=st.data())
def test_matches_fp64(bits, data):
    """Any strides, any storage; a floating weight with rows that are not contiguous is multiplied by a dense matmul."""
    # four in a graph: two graphs are compiled instead of eight
    cases = [data.draw(products(bits=bits, tokens=(1, 2, 3, MAX_TOKENS))) for _ in range(4)]
    with poisoned():
        results, code = each(masked_gemv, [(case.v, case.tau, case.weight, case.bias, case.scale) for case in cases])
    assert FALLBACK not in code
    # of one element or one row, either stride is that of contiguous rows
    assert calls(code, GEMV) == sum(bits < 16 or case.weight.stride(1) == 1 for case in cases)
    for case, got in zip(cases, results, strict=True):
        case.check(got)


@pytest.mark.parametrize("bits", [16, 8, 4])
@settings(max_examples=2)
@given(data=st.data())
def test_matches_fp64_in_several_blocks(bits, data):
    def case():
        choices = ([1, 5, MAX_TOKENS], [7, 97, 251], [514, 1030, 4500], [torch.float32, torch.bfloat16])
        density, seed = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), data.draw(st.integers(0, 99))
        return operands(*(data.draw(st.sampled_from(choice)) for choice in choices), bits=bits, density=density, seed=seed)

    cases = [case() for _ in range(3)]
    with poisoned():
        results, code = each(masked_gemv, cases)
    assert calls(code, GEMV) == len(cases)
    for (v, tau, weight, bias, scale), got in zip(cases, results, strict=True):
        Product(v, tau, weight, scale, bias).check(got)


def test_threads_change_no_bit():
    """2,000 columns are not a multiple of the grain size or of the columns per thread."""
    check_threads_change_no_bit(masked_gemv, [operands(3, 250, 2000, torch.float32, bits=bits) for bits in BITS], GEMV)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_parts_of_a_weight_in_the_graph(bits):
    """A view inside the graph has an offset of its own, and two views may be parts of one buffer."""
    v, tau, weight, bias, scale = operands(1, 61, 256, torch.float32, bits=bits)

    def rows(v, tau, weight, bias, scale):
        first, second = (None, None) if scale is None else (scale[10:41], scale[:31])
        y = masked_gemv(v[:, 10:41], tau[10:41], weight[10:41], bias, first)
        return y, masked_gemv(v[:, :31], tau[:31], weight[:31], bias, second)

    got, code = compiled(rows, v, tau, weight, bias, scale)
    assert code.count(GEMV) == 2
    for y, span in zip(got, (slice(10, 41), slice(31)), strict=True):
        Product(v[:, span], tau[span], weight[span], None if scale is None else scale[span], bias).check(y)
    if bits == 16:

        def columns(v, tau, weight):
            return masked_gemv(v, tau, torch.narrow(weight, 1, 64, 100)), masked_gemv(v, tau, weight[:, :64])

        got, code = compiled(columns, v, tau, weight)
        assert code.count(GEMV) == 2
        for y, part in zip(got, (weight[:, 64:164], weight[:, :64]), strict=True):
            Product(v, tau, part, None, None).check(y)

        def one_buffer(v, tau, weight):
            return masked_gemv(weight[:1, 3:64], weight[1, :61].abs(), weight)

        got, code = compiled(one_buffer, v, tau, weight)
        assert GEMV in code
        Product(weight[:1, 3:64], weight[1, :61].abs(), weight, None, None).check(got)


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


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 16), (torch.float32, 8), (torch.bfloat16, 4), (torch.bfloat16, 16)])
def test_fused_users(dtype, bits):
    """The scheduler fuses pointwise users into any template; a template that ignores them would give wrong results."""
    # in one graph, with different operands: equal matmuls would be computed once
    cases = [operands(3, 61, 128, dtype, bits=bits, seed=seed) for seed in range(len(USERS))]
    sizes = [len(case) for case in cases]

    def users(*flat):
        return [user(*flat[first : first + 5]) for user, first in zip(USERS, range(0, sum(sizes), 5), strict=True)]

    with poisoned():
        results, code = compiled(users, *itertools.chain(*cases))
    assert calls(code, GEMV) == len(USERS)
    assert FALLBACK not in code
    for user, (v, tau, weight, bias, scale), got in zip(USERS, cases, results, strict=True):
        right = user(v.double(), tau, unpack(weight, scale, torch.float64), bias.double(), None)
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, right)), strict=True):
            error = (a.double() - b).norm() / b.norm()
            assert error < 4 * torch.finfo(dtype).eps * math.sqrt(61), user.__name__


def test_epilogue_is_in_the_same_kernel():
    cases = [operands(1, 61, 128, torch.float32, bits=bits) for bits in BITS]
    _, code = each(lambda *args: silu(masked_gemv(*args)), cases)
    assert code.count(GEMV) == len(cases)
    assert code.count('extern "C"') == len(cases)  # one kernel each: compaction, product, bias and activation


def test_steps_aside():
    """More tokens, a dynamic number of tokens, or a weight whose rows are not contiguous, give a dense matmul."""
    many, tau, weight, bias, _ = operands(MAX_TOKENS + 1, 31, 64, torch.float32)
    for v, w in [(many, weight), (many[:1], weight.t().contiguous().t())]:
        got, code = compiled(masked_gemv, v, tau, w, bias)
        assert GEMV not in code
        Product(v, tau, w, None, bias).check(got)
    got, code = compiled(masked_gemv, many[:3], tau, weight, bias, dynamic=True)
    assert GEMV not in code
    Product(many[:3], tau, weight, None, bias).check(got)


def test_gradients_through_the_template():
    v, tau, weight, bias, _ = operands(2, 31, 64, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (v, weight, bias)]
    got, code = compiled(lambda a, w, b: masked_gemv(a, tau, w, b).square().sum(), *leaves)
    assert GEMV in code
    got.backward()
    right = [x.double().requires_grad_() for x in (v, weight, bias)]
    kept = v.square() >= tau
    ((right[0] * kept) @ right[1] + right[2]).square().sum().backward()
    for a, b in zip(leaves, right, strict=True):
        assert_close("grad", a.grad, b.grad, b.grad.abs() + 1, terms=31 * 64)


def test_weights_of_symbolic_size_are_left_to_a_matrix_product():
    lower.register()
    v, tau, weight = torch.randn(2, 12), torch.full((12,), 0.3), torch.randn(12, 7)
    compiled = torch.compile(lambda v, tau, weight: masked_gemv(v, tau, weight), dynamic=True)
    expected = reference.masked_gemv(v.double(), tau, weight.double())
    # fp32 sums of 12 terms
    torch.testing.assert_close(compiled(v, tau, weight).double(), expected, rtol=1e-5, atol=1e-5)
