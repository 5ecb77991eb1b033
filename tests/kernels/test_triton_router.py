"""The router's kernel against fp64, in every storage. Interpreted without a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from rana_fx.errors import BadOperand
from rana_fx.formats import pack, unpack
from rana_fx.kernels.triton.router import RouterConfig, router
from tests.support.products import DTYPES, SIZES, STRIDES, assert_close, kernels_run_on, strided

CONFIGS = st.builds(
    RouterConfig,
    block_r=st.sampled_from([4, 16]),
    block_d=st.sampled_from([64, 128]),
    warps=st.just(4),
    stages=st.sampled_from([1, 3]),
)


@st.composite
def cases(draw, bits):
    """x (T, D), weight as stored, its scale."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    t, r = draw(st.sampled_from([1, 2, 3, 4, 5, 16])), draw(st.sampled_from(SIZES))
    d = draw(st.sampled_from([size for size in SIZES if bits != 4 or size % 2 == 0]))
    dtype = draw(st.sampled_from(DTYPES))
    x = strided(torch.randn(t, d, generator=generator).to(dtype), draw(STRIDES))
    weight, scale = (torch.randn(r, d, generator=generator) / d**0.5).to(dtype), None
    if bits < 16:
        weight, scale = pack(weight, bits, draw(st.sampled_from([64, 128])))
    return x, strided(weight, draw(STRIDES)), scale


@pytest.fixture(autouse=True)
def _kernels_run(device):
    kernels_run_on(device)


def moved(case, device):
    return [tensor if tensor is None else tensor.to(device) for tensor in case]


@pytest.mark.parametrize("bits", [16, 8, 4])
@settings(max_examples=10)
@given(data=st.data())
def test_matches_fp64(device, bits, data):
    x, weight, scale = moved(data.draw(cases(bits)), device)
    config = data.draw(CONFIGS)
    z = router(x, weight, scale, config=config)
    w = unpack(weight, scale, torch.float64)
    assert z.dtype == x.dtype
    assert_close("z", z, x.double() @ w.t(), x.double().abs() @ w.t().abs(), terms=x.shape[1])
    assert torch.equal(z, router(x, weight, scale, config=config))


@pytest.mark.parametrize("bits", [16, 8, 4])
@settings(max_examples=5)
@given(data=st.data())
def test_norm_in_front(device, bits, data):
    x, weight, scale = moved(data.draw(cases(bits)), device)
    eps, offset = data.draw(st.sampled_from([1e-6, 1e-5, 0.5])), data.draw(st.sampled_from([0.0, 1.0]))
    size, step = x.shape[1], data.draw(st.sampled_from([1, 2]))
    gain = torch.randn(size * step, generator=torch.Generator().manual_seed(1)).to(device, x.dtype)[::step]
    gain = data.draw(st.sampled_from([gain, gain.float(), None]))
    config = dataclasses.replace(data.draw(CONFIGS), ahead=data.draw(st.sampled_from([0, 1, 4])))
    z = router(x, weight, scale, gain=gain, eps=eps, offset=offset, config=config)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    normed = normed if gain is None else normed * (gain.double() + offset)
    w = unpack(weight, scale, torch.float64)
    assert z.dtype == x.dtype
    # the sum of squares errs as the product does
    assert_close("z", z, normed @ w.t(), 2 * normed.abs() @ w.t().abs(), terms=size)


def test_norm_of_zeros_is_zero(device):
    z = router(torch.zeros(2, 8, device=device), torch.ones(3, 8, device=device), eps=1e-6)
    assert torch.equal(z, torch.zeros(2, 3, device=device))


def test_wrong_gain_is_refused(device):
    x, weight = torch.ones(1, 5, device=device), torch.ones(3, 5, device=device)
    with pytest.raises(BadOperand, match="gain"):
        router(x, weight, gain=torch.ones(4, device=device), eps=1e-6)
    with pytest.raises(BadOperand, match="an eps"):
        router(x, weight, gain=torch.ones(5, device=device))


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_default_config(device, tokens):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((tokens, 97), (31, 97)))
    exact = x.double() @ weight.double().t()
    assert_close("z", router(x, weight), exact, x.double().abs() @ weight.double().abs().t(), terms=97)


@pytest.mark.parametrize("shapes", [((1, 4), (3, 5)), ((17, 5), (3, 5))])
def test_wrong_operands_are_refused(device, shapes):
    with pytest.raises(BadOperand) as error:
        router(*(torch.ones(shape, device=device) for shape in shapes))
    assert error.value.facts["name"] == "x"
