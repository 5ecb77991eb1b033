"""Quantised weights multiplied by integer dot products on a CPU, for each instruction set: numerics, error of a coefficient, and
values that only fp32 can hold."""

from __future__ import annotations

import math

import pytest
import torch

from rana_fx.formats import pack, unpack
from rana_fx.kernels.cpp import integers
from rana_fx.kernels.ops import masked_gemv, router
from tests.support.inductor import GEMV, ROUTER, calls, each, poisoned
from tests.support.products import Product, assert_close, every_number

FACTS = {
    "vnni": {"dot": "vnni", "bits": 512, "mm": "_mm512_"},
    "maddubs": {"dot": "maddubs", "bits": 256, "mm": "_mm256_"},
    "none": {"dot": None, "bits": 256, "mm": "_mm256_"},
}
MARKS = {"vnni": "_mm512_dpbusd_epi32", "maddubs": "_mm256_maddubs_epi16"}


@pytest.fixture(params=FACTS)
def instructions(request, monkeypatch):
    """Code is compiled for these instructions; where Inductor compiles for AVX512, those of AVX2 are there as well."""
    best = integers.facts(torch.float32)["dot"]
    if (request.param == "vnni" and best != "vnni") or best is None:
        pytest.skip(f"the CPU lacks {request.param}")
    real = integers.facts
    monkeypatch.setattr(integers, "facts", lambda dtype: real(dtype) | FACTS[request.param])
    return request.param


def case(tokens, ranks, outputs, dtype, bits, *, density=0.7, size=1.0, group=64):
    generator = torch.Generator().manual_seed(ranks + outputs)
    v = (torch.randn(tokens, ranks, generator=generator) * size).to(dtype)
    tau = torch.where(torch.rand(ranks, generator=generator) < density, 0.0, math.inf)
    values = torch.randn(ranks, outputs, generator=generator) / math.sqrt(ranks)
    weight, scale = every_number(*(pack(values, 8) if bits == 8 else pack(values, 4, group=group)), generator)
    return Product(v, tau, weight, scale, torch.randn(outputs, generator=generator).to(dtype))


def results(cases):
    given = [(one.v, one.tau, one.weight, one.bias, one.scale) for one in cases]
    with poisoned(), torch._inductor.config.patch(fx_graph_cache=False):
        found, code = each(masked_gemv, given)
    assert calls(code, GEMV) == len(cases)
    return found, code


@pytest.mark.parametrize("bits", [8, 4])
def test_matches_fp64(instructions, bits):
    """Fewer ranks than are multiplied at once, a multiple of them and more; columns that end within a vector and a group."""
    cases = [
        case(1, 15, 34, torch.float32, bits),
        case(1, 16, 2, torch.float32, bits, density=1.0),
        case(3, 97, 130, torch.bfloat16, bits),
        case(1, 250, 576, torch.float32, bits, group=128),
        case(2, 40, 4500, torch.float16, bits, density=1.0),
        case(8, 65, 1030, torch.float32, bits),
    ]
    found, code = results(cases)
    assert all((MARKS[name] in code) == (name == instructions) for name in MARKS)
    for one, got in zip(cases, found, strict=True):
        one.check(got)


@pytest.mark.parametrize("bits", [8, 4])
def test_values_that_integers_do_not_hold(instructions, bits):  # noqa: ARG001
    """Too large or too small for a step in fp32; zeros; and a few of them among others."""
    cases = [case(1, 48, 130, torch.float32, bits, size=size) for size in (1e-37, 1e32, 0.0)]
    mixed = case(2, 64, 130, torch.float32, bits, density=1.0)
    mixed.v[0, 3], mixed.v[1, 20], mixed.v[:, 32:48] = 1e31, 0.0, 0.0
    found, _ = results([*cases, mixed])
    for one, got in zip([*cases, mixed], found, strict=True):
        one.check(got)


@pytest.mark.parametrize("bits", [8, 4])
def test_routers_match_fp64(instructions, bits):
    """Rows that end within a vector, which AVX2 leaves to fp32; inputs that only fp32 holds; one of them not a number."""
    sizes = [(1, 5, 576), (1, 1, 64), (3, 33, 130), (8, 18, 256), (2, 7, 64)]
    given = []
    for tokens, ranks, width in sizes:
        generator = torch.Generator().manual_seed(width)
        weight, scale = every_number(*pack(torch.randn(ranks, width, generator=generator) / width**0.5, bits), generator)
        given.append((torch.randn(tokens, width, generator=generator), weight, scale))
    given[-1][0].mul_(1e-37)
    given.append((given[0][0].clone(), *given[0][1:]))
    given[-1][0][0, 70] = math.nan
    with poisoned(), torch._inductor.config.patch(fx_graph_cache=False):
        found, code = each(router, given)
    assert calls(code, ROUTER) == len(given)
    assert all((MARKS[name] in code) == (name == instructions) for name in MARKS)
    for (x, weight, scale), got in zip(given[:-1], found[:-1], strict=True):
        w = unpack(weight, scale, torch.float64)
        assert_close("z", got, x.double() @ w.t(), x.double().abs() @ w.abs().t(), terms=x.shape[-1])
    assert bool(found[-1].isnan().all())


@pytest.mark.parametrize("passes", [2, 3])
def test_error_of_a_coefficient(instructions, monkeypatch, passes):
    """Column n reads rank n alone: the result is its coefficient, within the stated part of the largest of its 16 ranks."""
    if instructions == "none":
        pytest.skip("no integers")
    whole = integers.facts
    monkeypatch.setattr(integers, "facts", lambda dtype: whole(dtype) | {"passes": passes})
    v = torch.randn(1, 64, generator=torch.Generator().manual_seed(passes))
    weight, scale = torch.diag(torch.full((64,), 127, dtype=torch.int8)), torch.full((64,), 1 / 127)
    ((got,), _) = results([Product(v, torch.zeros(64), weight, scale, torch.zeros(64))])
    error = (got.double() - v.double()).abs()[0].view(4, 16)
    largest = v.abs()[0].view(4, 16).amax(1, keepdim=True).double()
    eps = torch.finfo(torch.float32).eps
    bound = largest / (2 * 127 * 254 ** (passes - 1)) + 4 * eps * largest  # and rounding of the scale, a step and the sum
    assert bool((error <= bound).all())
    assert float((error / largest).max()) > (1e-6 if passes == 2 else 0)  # it is the rounding of two integers that is seen
