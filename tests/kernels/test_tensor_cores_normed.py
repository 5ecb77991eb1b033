"""The masked GEMV on tensor cores with a norm in front: its source under an emulator, and launches on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rana_fx.errors import BadOperand
from rana_fx.kernels import ops
from rana_fx.kernels.cuda import masked_gemv as kernel
from rana_fx.kernels.cuda import op
from rana_fx.kernels.cuda.config import Config, default_config
from rana_fx.kernels.cuda.masked_gemv import Norm
from rana_fx.kernels.reference import ACTIVATIONS, normed
from rana_fx.passes import lower
from tests.support import emulated
from tests.support.emulated import product

EPS = 1e-5
GPU = [pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = {
    "4 bits, integers, a partial segment": (product(1, 97, 512 + 96, 4, scale_dtype=torch.float32), Config(1, 2, 2, 3)),
    "8 bits, integers, two tokens": (product(2, 130, 272, 8), Config(2, 2, 2, 3)),
    "4 bits, fp16, three tokens": (product(3, 120, 256, 4, dtype=torch.float16), Config(1, 2, 3, 3)),
    "8 bits, fp16, four tokens": (product(4, 72, 128, 8, dtype=torch.float16), Config(1, 1, 2, 3)),
    "16 bits, four tokens": (product(4, 130, 136, 16), Config(2, 1, 2, 3)),
}


def normalised(case, gain, offset=0.0):
    """The same product of values after their norm. Thresholds that rounding could pass, within a hundredth, keep everything."""
    v = case.v.double()
    v = v / (v.square().mean(1, keepdim=True) + EPS).sqrt()
    v = v if gain is None else v * (gain.double() + offset)
    close = ((v.square() - case.tau).abs() < 0.02 * case.tau).any(0)
    return dataclasses.replace(case, v=v.to(case.v.dtype), tau=torch.where(close, 0.0, case.tau))


def gain_of(case, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(3)
    return (1 + torch.randn(case.v.shape[1], generator=generator) / 4).to(dtype).to(case.v.device)


@pytest.mark.parametrize("name", CASES)
def test_matches_fp64(name):
    """Ranks that are kept by few, all and no tokens; a gain, a gain from a number on, and none; large and small inputs."""
    case, config = CASES[name]
    for gain, offset, size, threshold in (
        (gain_of(case), 0.0, 1.0, 1.0), (gain_of(case, torch.float32), 1.0, 30.0, 0.0), (None, 0.0, 2**-9, 1e30),
    ):  # fmt: skip
        h = case.v * size
        one = normalised(dataclasses.replace(case, v=h, tau=case.tau * threshold), gain, offset)
        y = emulated.masked_gemv(h, *one.operands[1:], norm=Norm(gain, EPS, offset), config=config)
        one.check(y)
        early = emulated.masked_gemv(h, *one.operands[1:], norm=Norm(gain, EPS, offset), config=config, early=True)
        assert torch.equal(early, y)


def test_eps_counts():
    case = dataclasses.replace(product(1, 64, 256, 4, threshold=0.0), v=torch.full((1, 64), 2.0**-8).bfloat16())
    y = emulated.masked_gemv(*case.operands, norm=Norm(None, 3 * 2.0**-16))
    dataclasses.replace(case, v=case.v * 2**7).check(y)  # 1 / sqrt(1 + 3) of a unit


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_with_an_activation(bits):
    case = product(1, 80, 512, bits)
    gain = gain_of(case)
    one = normalised(case, gain)
    y = emulated.masked_gemv(case.v, *one.operands[1:], norm=Norm(gain, EPS), activation="silu", config=Config(2, 1, 2, 3))
    one.check_gated(y, ACTIVATIONS["silu"])


def test_any_strides():
    """Of tokens that are not contiguous, whose neighbours are not aligned, and whose last few are fewer than eight."""
    case = product(2, 50, 256, 4)
    apart, behind = torch.zeros(2, 3 * 56, dtype=torch.bfloat16)[:, :150:3], torch.zeros(2, 51, dtype=torch.bfloat16)[:, 1:]
    aligned = torch.zeros(2, 56, dtype=torch.bfloat16)[:, :50]
    gain = torch.zeros(50, 2)[:, 1].copy_(gain_of(case))
    one = normalised(case, gain)
    for v in (apart, behind, aligned):
        one.check(emulated.masked_gemv(v.copy_(case.v), *one.operands[1:], norm=Norm(gain, EPS)))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_a_token_that_is_not_finite_is_nan(bits, odd):
    """As its dense product is: infinity over an infinite norm is NaN, and every other value is zero or NaN. Other tokens are as
    without it."""
    case = product(2, 64, 256, bits, bias=False)
    v = case.v.clone()
    v[0, 5] = odd
    one = normalised(case, None)
    y = emulated.masked_gemv(v, *one.operands[1:], norm=Norm(None, EPS), config=Config(1, 2, 1, 3))
    assert bool(y[0].isnan().all())
    dataclasses.replace(one, v=one.v[1:]).check(y[1:])


def test_what_does_not_fit_is_refused():
    case = product(5, 64, 256, 4)
    with pytest.raises(BadOperand, match="5 tokens: expected 1 to 4, of which each block reads all values"):
        emulated.masked_gemv(*case.operands, norm=Norm(None, EPS))
    with pytest.raises(BadOperand, match=r"gain is \(3,\): expected \(64,\)"):
        emulated.masked_gemv(case.v[:1], *case.operands[1:], norm=Norm(torch.ones(3), EPS))


# ---- on a GPU


@pytest.mark.parametrize("device", GPU, indirect=True)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_a_launch_matches_fp64(device, bits, tokens):
    for ranks, columns in ((97, 512), (4100, 1024), (4096, 12288)):
        case = product(tokens, ranks, columns, bits).to(device)
        gain = gain_of(case)
        one = normalised(case, gain)
        y = kernel.masked_gemv(case.v, *one.operands[1:], norm=Norm(gain, EPS))
        one.check(y)
        assert torch.equal(y, kernel.masked_gemv(case.v, *one.operands[1:], norm=Norm(gain, EPS), early=True))


@pytest.mark.parametrize("device", GPU, indirect=True)
def test_opcheck(device):
    case = product(2, 64, 512, 4).to(device)
    for activation in (None, "silu"):
        fields = list(dataclasses.astuple(default_config(64, 512, 2, bits=4, gated=activation is not None)))
        operands = (case.v, case.tau, case.weight, case.bias, case.scale, None, activation, gain_of(case), EPS, 1.0)
        torch.library.opcheck(op.masked_gemv_tensor_cores, (*operands, fields, False))


@pytest.mark.parametrize("device", GPU, indirect=True)
def test_compiled_graphs_launch_it(device):
    """In a CUDA graph; the result is the eager launch's to the bit."""
    case = product(1, 512, 1024, 4).to(device)
    gain = gain_of(case)
    wanted = kernel.masked_gemv(*case.operands, activation="silu", norm=Norm(gain, EPS))
    lower.register()

    @torch.compile(mode="reduce-overhead")
    def step(v):
        return ops.masked_gemv_normed(v, gain, case.tau, case.weight, case.bias, case.scale, 0.5, "silu", EPS, 0.0)

    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(step(case.v), wanted)


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_norm_is_that_of_the_reference(tokens):
    case, _ = CASES["16 bits, four tokens"]
    h, gain = case.v[:tokens], gain_of(case)
    wanted = ops.masked_gemv(normed(h, gain, EPS, 0.5).to(h.dtype), *case.operands[1:])
    assert torch.equal(ops.masked_gemv_normed(h, gain, *case.operands[1:4], None, 0.5, None, EPS, 0.5), wanted)
