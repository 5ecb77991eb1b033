"""The router's kernel and the lists it leaves, against fp64 and against what the product would have listed itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from rana_fx.errors import BadOperand
from rana_fx.kernels.config import Config
from rana_fx.kernels.masked_gemv import masked_gemv, partials
from rana_fx.kernels.quantize import pack, unpack
from rana_fx.kernels.router import RouterConfig, router, router_listed
from tests.kernels.products import DTYPES, SIZES, STRIDES, Product, assert_close, kernels_run_on, strided

CONFIGS = st.builds(
    RouterConfig,
    block_r=st.sampled_from([1, 4, 16]),
    block_d=st.sampled_from([32, 128]),
    warps=st.just(4),
    stages=st.sampled_from([1, 3]),
)


@st.composite
def cases(draw, bits):
    """x (T, D), weight as stored, its scale, tau (R,)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    t, r = draw(st.sampled_from([1, 2, 3, 4, 5, 16])), draw(st.sampled_from(SIZES))
    d = draw(st.sampled_from([size for size in SIZES if bits != 4 or size % 2 == 0]))
    dtype = draw(st.sampled_from(DTYPES))
    x = strided(torch.randn(t, d, generator=generator).to(dtype), draw(STRIDES))
    weight, scale = (torch.randn(r, d, generator=generator) / d**0.5).to(dtype), None
    if bits < 16:
        weight, scale = pack(weight, bits, draw(st.sampled_from([64, 128])))
    tau = torch.full((r,), draw(st.sampled_from([0.0, 0.5, 1.5, float("inf")])))
    return x, strided(weight, draw(STRIDES)), scale, tau


@pytest.fixture(autouse=True)
def _kernels_run(device):
    kernels_run_on(device)


def moved(case, device):
    return [tensor if tensor is None else tensor.to(device) for tensor in case]


@pytest.mark.parametrize("bits", [16, 8, 4])
@settings(max_examples=12)
@given(data=st.data())
def test_matches_fp64_and_lists_what_is_kept(device, bits, data):
    x, weight, scale, tau = moved(data.draw(cases(bits)), device)
    config = data.draw(CONFIGS)
    z, lists = router_listed(x, weight, tau, scale, config=config)
    w = unpack(weight, scale, torch.float64)
    assert z.dtype == x.dtype
    assert_close("z", z, x.double() @ w.t(), x.double().abs() @ w.t().abs(), terms=x.shape[1])
    listed = torch.cat([entries[:count] for entries, count in zip(lists.ranks, lists.counts.tolist(), strict=True)])
    assert torch.equal(listed.long(), (z.float().square() >= tau).any(0).nonzero().flatten())
    assert torch.equal(z, router(x, weight, scale, config=config))


@settings(max_examples=12)
@given(data=st.data())
def test_the_product_takes_its_ranks_from_the_lists(device, data):
    bits, splits, block_m = (data.draw(st.sampled_from(values)) for values in ([16, 4], [1, 3], [4, 16]))
    x, weight, scale, tau = moved(data.draw(cases(bits)), device)
    z, lists = router_listed(x, weight, tau, scale, config=data.draw(CONFIGS))
    wide = torch.randn(tau.shape[0], 66, generator=torch.Generator().manual_seed(0)).to(z.dtype).to(device)
    wide, steps = pack(wide, bits) if bits == 4 else (wide, None)
    config = Config(splits=splits, block_n=64, block_m=block_m)
    y = masked_gemv(z, tau, wide, None, steps, config=config, lists=lists)
    Product(z, tau, wide, steps, None).check(y)


def test_lists_and_scratch_agree_to_the_bit(device):
    generator = torch.Generator().manual_seed(0)
    x, weight, wide = (torch.randn(shape, generator=generator).to(device) for shape in ((1, 64), (64, 64), (64, 33)))
    tau = torch.full((64,), 20.0, device=device)
    z, lists = router_listed(x, weight, tau, config=RouterConfig(block_r=16))
    # groups of 16 ranks, taken in turn, are the blocks of the router
    config = Config(splits=2, group=16, block_m=4)
    assert torch.equal(partials(z, tau, wide, config=config), partials(z, tau, wide, config=config, lists=lists))


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_default_config(device, tokens):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((tokens, 97), (31, 97)))
    exact = x.double() @ weight.double().t()
    assert_close("z", router(x, weight), exact, x.double().abs() @ weight.double().abs().t(), terms=97)


@pytest.mark.parametrize(
    ("shapes", "name"), [(((1, 4), (3, 5), (3,)), "x"), (((17, 5), (3, 5), (3,)), "x"), (((1, 5), (3, 5), (4,)), "tau")]
)
def test_wrong_operands_are_refused(device, shapes, name):
    x, weight, tau = (torch.ones(shape, device=device) for shape in shapes)
    with pytest.raises(BadOperand) as error:
        router_listed(x, weight, tau)
    assert error.value.facts["name"] == name
