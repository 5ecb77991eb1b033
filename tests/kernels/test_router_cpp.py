"""The C++ template of the router through Inductor: numerics in every storage, fusions, and cases that it declines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rana_fx.formats import pack, unpack
from rana_fx.kernels.cpp.template import MAX_TOKENS
from rana_fx.kernels.ops import masked_gemv, router
from tests.support.inductor import GEMV, ROUTER, calls, check_threads_change_no_bit, compiled, each, poisoned
from tests.support.products import DTYPES, SIZES, STRIDES, Product, assert_close, strided

FALLBACK = "torch.ops.rana"


def operands(tokens, rows, width, dtype, bits, *, group=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(rows, width, generator=generator) / width**0.5).to(dtype)
    return (x, weight, None) if bits == 16 else (x, *pack(weight, bits, group))


def check(z, x, weight, scale):
    w = unpack(weight, scale, torch.float64)
    assert z.dtype == x.dtype
    assert_close("z", z, x.double() @ w.t(), x.double().abs() @ w.t().abs(), terms=x.shape[-1])


@pytest.mark.parametrize("bits", [16, 8, 4])
@settings(max_examples=2)
@given(data=st.data())
def test_matches_fp64(bits, data):
    # four in a graph: two graphs are compiled instead of eight
    cases = [drawn(data, bits) for _ in range(4)]
    with poisoned():
        results, code = each(router, cases)
    assert FALLBACK not in code
    assert bits == 16 or calls(code, ROUTER) == len(cases)
    for got, case in zip(results, cases, strict=True):
        check(got, *case)


def drawn(data, bits):
    tokens, rows = data.draw(st.sampled_from([1, 2, 5, MAX_TOKENS])), data.draw(st.sampled_from([*SIZES, 530]))
    width = data.draw(st.sampled_from([size for size in [*SIZES, 514] if bits != 4 or size % 2 == 0]))
    group, seed = data.draw(st.sampled_from([64, 128])), data.draw(st.integers(0, 99))
    x, weight, scale = operands(tokens, rows, width, data.draw(st.sampled_from(DTYPES)), bits, group=group, seed=seed)
    x, weight = strided(x, data.draw(STRIDES)), strided(weight, data.draw(STRIDES))
    if scale is not None and scale.dim() == 2:
        scale = strided(scale, data.draw(STRIDES))
    return x, weight, scale


def test_threads_change_no_bit():
    check_threads_change_no_bit(router, [operands(3, 1001, 250, torch.float32, bits) for bits in (8, 4)], ROUTER)


def test_cast_and_users_are_in_the_same_kernel():
    cases = [operands(1, 61, 128, torch.bfloat16, bits) for bits in (8, 4)]
    with poisoned():
        results, code = each(lambda *args: torch.relu(router(*args)), cases)
    assert code.count(ROUTER) == code.count('extern "C"') == len(cases)
    for got, (x, weight, scale) in zip(results, cases, strict=True):
        right = x.double() @ unpack(weight, scale, torch.float64).t()
        assert_close("z", got, right.relu(), x.double().abs() @ unpack(weight, scale, torch.float64).t().abs(), terms=128)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_whole_adapter_reads_stored_numbers_alone(bits):
    """Quantised router and matmul in one graph: two kernels and no fallback."""
    x, weight, scale = operands(2, 61, 128, torch.float32, bits)
    x = x[None]
    down, down_scale = pack(torch.randn(61, 64) / 8, bits)
    tau = torch.full((61,), 0.3)
    got, code = compiled(
        lambda *a: masked_gemv(router(a[0], *a[1:3]), *a[3:5], None, a[5]), x, weight, scale, tau, down, down_scale
    )
    assert (code.count(ROUTER), code.count(GEMV), code.count(FALLBACK)) == (1, 1, 0)
    z, _ = compiled(router, x, weight, scale)
    Product(z, tau, down, down_scale, None).check(got)


def test_more_tokens_are_a_matrix_product():
    cases = [operands(MAX_TOKENS + 1, 31, 64, torch.float32, bits) for bits in (16, 8, 4)]
    results, code = each(router, cases)
    assert ROUTER not in code
    for got, case in zip(results, cases, strict=True):
        check(got, *case)
