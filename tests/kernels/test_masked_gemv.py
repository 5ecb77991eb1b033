"""rana::masked_gemv against fp64, over shapes, strides, dtypes and thresholds at the extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.kernels import reference
from rana_fx.kernels.ops import masked_gemv

SIZES = st.sampled_from([1, 2, 3, 7, 16, 31, 64, 97])


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tokens, k, n = draw(st.sampled_from([1, 2, 5])), draw(SIZES), draw(SIZES)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    v = torch.randn(2, tokens, k, generator=generator).to(dtype)
    if draw(st.booleans()):
        v = torch.cat([v, v], -1)[..., :k]  # strided rows
    weight = torch.randn(k, n, generator=generator).to(dtype)
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    tau = draw(st.sampled_from(["none", "all", "some", "inf"]))
    thresholds = {"none": 0.0, "all": 1e30, "some": 0.5, "inf": float("inf")}[tau]
    bias = torch.randn(n, generator=generator).to(dtype) if draw(st.booleans()) else None
    return v, torch.full((k,), thresholds), weight, bias


@given(cases())
def test_matches_fp64(case):
    v, tau, weight, bias = case
    got = masked_gemv(v, tau, weight, bias)
    kept = v.float().square() >= tau
    exact = (v.double() * kept) @ weight.double() + (0 if bias is None else bias.double())
    assert got.dtype == v.dtype
    assert got.shape == (*v.shape[:-1], weight.shape[1])
    # rounding of the result, and of an accumulation over K
    eps = torch.finfo(v.dtype).eps
    bound = 4 * eps * math.sqrt(math.log2(v.shape[-1]) + 1)
    scale = (v.double().abs() * kept) @ weight.double().abs() + (0 if bias is None else bias.double().abs())
    assert ((got.double() - exact).abs() <= bound * scale + 1e-30).all()


def test_half_precision_squares_do_not_overflow():
    v = torch.tensor([[300.0, 1e-4]], dtype=torch.float16)  # 300^2 overflows fp16, (1e-4)^2 vanishes in it
    kept = reference.kept(v, torch.tensor([80_000.0, 5e-9]))
    assert kept.tolist() == [[True, True]]


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    weight = torch.randn(5, 7, requires_grad=True)
    if transposed:
        weight = torch.randn(7, 5).t().requires_grad_()
    v = torch.randn(2, 3, 5, requires_grad=True)
    torch.library.opcheck(masked_gemv, (v, torch.full((5,), 0.3), weight, torch.randn(7, requires_grad=True)))


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    v = torch.where((v.square() - 0.3).abs() < 0.05, v + 0.3, v).requires_grad_()  # away from the threshold
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    tau = torch.full((5,), 0.3)
    assert torch.autograd.gradcheck(lambda *a: masked_gemv(a[0], tau, a[1], a[2]), (v, weight, bias))


def test_wrong_shapes_are_refused_under_tracing():
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match="expected"):
        masked_gemv(torch.empty(2, 4), torch.empty(4), torch.empty(5, 3))
