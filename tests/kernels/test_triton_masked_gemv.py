"""Kernels of the masked matmul against fp64, in every storage, with the split-K reduction. Interpreted without a GPU."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from rana_fx.errors import BadOperand, UnknownChoice
from rana_fx.formats import pack, unpack
from rana_fx.kernels.reference import ACTIVATIONS
from rana_fx.kernels.triton import splitk
from rana_fx.kernels.triton.config import Config, Launch
from rana_fx.kernels.triton.masked_gemv import masked_gemv
from rana_fx.kernels.triton.splitk import ACTIVATION_CODES as KERNELS
from rana_fx.kernels.triton.splitk import RING, counters_for
from tests.support.products import STRIDES, Product, kernels_run_on, products, strided

CONFIGS = st.builds(
    Config,
    splits=st.sampled_from([1, 2, 5]),
    block_n=st.sampled_from([64, 128]),
    block_m=st.sampled_from([1, 4, 16]),
    warps=st.sampled_from([1, 4]),
    stages=st.sampled_from([1, 2]),
    early=st.sampled_from([0, 1, 8]),
)


@pytest.fixture(autouse=True)
def _kernels_run(device):
    kernels_run_on(device)


def check(case, config):
    y = masked_gemv(case.v, case.tau, case.weight, case.bias, case.scale, config=config)
    case.check(y)
    again = masked_gemv(case.v, case.tau, case.weight, case.bias, case.scale, config=config)
    assert torch.equal(y, again)


@pytest.mark.parametrize("bits", [16, 8, 4])
class TestEveryStorage:
    @settings(max_examples=12)
    @given(data=st.data())
    def test_matches_fp64(self, device, bits, data):
        check(data.draw(products(bits=bits)).to(device), data.draw(CONFIGS))

    def test_default_config(self, device, bits):
        generator = torch.Generator().manual_seed(bits)
        weight, scale = torch.randn(97, 66, generator=generator), None
        if bits < 16:
            weight, scale = pack(weight, bits)
        v = torch.randn(2, 1, 97, generator=generator)
        case = Product(v, torch.full((97,), 0.5), weight, scale, None).to(device)
        case.check(masked_gemv(case.v, case.tau, case.weight, None, case.scale))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_counters_are_left_at_zero(device, bits):
    weight = torch.randn(40, 256, device=device)
    weight, scale = pack(weight, bits) if bits < 16 else (weight, None)
    counters = torch.zeros(99, dtype=torch.int32, device=device)
    for tokens in (1, 7):
        v, config = torch.randn(tokens, 40, device=device), Config(3, block_n=64)
        y = masked_gemv(v, torch.zeros(40, device=device), weight, None, scale, config=config, counters=counters)
        torch.testing.assert_close(y, v @ unpack(weight, scale), rtol=1e-4, atol=1e-4)
        assert not counters.any()


def test_overlapping_launches_get_different_counters(device):
    first, second = counters_for(device, 5), counters_for(device, 40)
    assert first.shape == (5,)
    assert second.data_ptr() == first.data_ptr() + 32 * 4
    for _ in range(RING // 64 + 1):
        assert not counters_for(device, 40).any()
    assert counters_for(device, RING + 1).shape == (RING + 1,)


def test_counters_are_made_by_a_thread_of_their_own(device, monkeypatch):
    """What the calling thread allocates may belong to a CUDA graph that is being warmed up, and they outlive it."""
    made, zeros = [], torch.zeros

    def recorded(*args, **kwargs):
        made.append(threading.get_ident())
        return zeros(*args, **kwargs)

    monkeypatch.setattr(splitk, "_rings", {})
    monkeypatch.setattr(splitk, "_next", {})
    monkeypatch.setattr(torch, "zeros", recorded)
    first, second = counters_for(device, 5), counters_for(device, 5)
    assert first.data_ptr() != second.data_ptr()
    assert len(made) == 1 and made[0] != threading.get_ident()


@pytest.mark.parametrize("bits", [16, 8, 4])
@settings(max_examples=8)
@given(data=st.data())
def test_residual(device, bits, data):
    case, config = data.draw(products(bits=bits)).to(device), data.draw(CONFIGS)
    shape, dtype = (case.v.shape[0], case.sums()[0].shape[1]), data.draw(st.sampled_from([case.v.dtype, torch.float32]))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    residual = strided(values, data.draw(STRIDES))
    y = masked_gemv(case.v, case.tau, case.weight, case.bias, case.scale, residual=residual, config=config)
    case.check(y, residual)


def test_every_activation_has_a_kernel():
    assert set(KERNELS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
@settings(max_examples=10)
@given(data=st.data())
def test_activation(device, name, data):
    bits = data.draw(st.sampled_from([16, 16, 8, 4]))
    case, config = data.draw(products(bits=bits, halves=True)).to(device), data.draw(CONFIGS)
    y = masked_gemv(case.v, case.tau, case.weight, case.bias, case.scale, activation=name, config=config)
    case.check_gated(y, ACTIVATIONS[name])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_large_arguments(device, name):
    """No intermediate value overflows."""
    v = torch.tensor([[1.0]], device=device)
    gate = torch.tensor([-3e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 3e4], device=device)
    weight = torch.cat([gate, torch.ones_like(gate)])[None]
    y = masked_gemv(v, torch.zeros(1, device=device), weight, activation=name)
    torch.testing.assert_close(y[0].double(), ACTIVATIONS[name](gate.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("bits", "tokens"), [(16, 1), (8, 3), (4, 6)])
def test_activation_of_one_half_times_the_other(device, name, bits, tokens):
    generator = torch.Generator().manual_seed(tokens)
    weight, scale = torch.randn(33, 2 * 192, generator=generator), None
    if bits < 16:
        weight, scale = pack(weight, bits)
    v, bias = torch.randn(tokens, 33, generator=generator), torch.randn(384, generator=generator)
    case = Product(v, torch.full((33,), 0.5), weight, scale, bias).to(device)
    plain = torch.where(case.v.square() >= case.tau, case.v, 0).double() @ unpack(case.weight, case.scale, torch.float64)
    gate, up = (plain + case.bias).chunk(2, -1)
    config = Config(3, block_n=128, block_m=2, warps=1)
    y = masked_gemv(case.v, case.tau, case.weight, case.bias, case.scale, activation=name, config=config)
    assert y.shape == (tokens, 192)
    # fp32 sums of 33 terms of size 1, then exp
    torch.testing.assert_close(y.double(), ACTIVATIONS[name](gate) * up, rtol=1e-4, atol=1e-4)


def test_slices_without_ranks_add_nothing(device):
    v, tau, weight = (torch.ones(shape, device=device) for shape in ((1, 3), (3,), (3, 5)))
    y = masked_gemv(v, tau, weight, config=Config(splits=5))
    assert torch.equal(y, torch.full_like(y, 3.0))


def test_half_precision_squares_do_not_overflow(device):
    v = torch.tensor([[300.0, 1e-4]], dtype=torch.float16, device=device)
    y = masked_gemv(v, torch.tensor([80_000.0, 5e-9], device=device), torch.eye(2, dtype=torch.float16, device=device))
    assert torch.equal(y, v)


def test_many_ranks(device):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 65_536, generator=generator)
    case = Product(v, torch.full((65_536,), 9.0), torch.randn(65_536, 3, generator=generator), None, None).to(device)
    case.check(masked_gemv(case.v, case.tau, case.weight))


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (((1, 4), (4,), (5, 3)), "v"),
        (((1, 5), (4,), (5, 3)), "tau"),
        (((17, 5), (5,), (5, 3)), "v"),
        (((1, 5), (5,), (5,)), "weight"),
    ],
)
def test_wrong_operands_are_refused(device, shapes, name):
    v, tau, weight = (torch.ones(shape, device=device) for shape in shapes)
    with pytest.raises(BadOperand) as error:
        masked_gemv(v, tau, weight)
    assert error.value.facts["name"] == name


def test_wrong_bias_and_activation_are_refused(device):
    v, tau, weight = (torch.ones(shape, device=device) for shape in ((1, 3), (3,), (3, 5)))
    with pytest.raises(BadOperand, match="bias"):
        masked_gemv(v, tau, weight, torch.ones(4, device=device))
    with pytest.raises(UnknownChoice, match="gelu_tanh"):
        masked_gemv(v, tau, weight, activation="tanh")
    with pytest.raises(BadOperand, match="a multiple of 2"):
        masked_gemv(v, tau, weight, activation="silu")
    with pytest.raises(BadOperand, match="residual"):
        masked_gemv(v, tau, weight, residual=torch.ones(5, device=device))
    with pytest.raises(BadOperand, match="no activation"):
        masked_gemv(v, tau, weight, residual=torch.ones(1, 5, device=device), activation="silu")
    with pytest.raises(BadOperand, match="counters"):
        masked_gemv(v, tau, weight, how=Launch(traced=True))
