"""Quantised weights multiplied by integer dot products on a CPU, for each instruction set: numerics, error of a coefficient, and
values that only fp32 can hold."""

from __future__ import annotations

import contextlib
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


BITS = (8, 4)


@pytest.fixture(scope="module", params=FACTS)
def instructions(request):
    best = integers.facts(torch.float32)["dot"]
    if (request.param == "vnni" and best != "vnni") or best is None:
        pytest.skip(f"the CPU lacks {request.param}")
    return request.param


@contextlib.contextmanager
def compiling_for(instructions, **more):
    """Where Inductor compiles for AVX512, instructions of AVX2 are there as well."""
    real = integers.facts
    with pytest.MonkeyPatch.context() as patch, poisoned(), torch._inductor.config.patch(fx_graph_cache=False):
        patch.setattr(integers, "facts", lambda dtype: real(dtype) | FACTS[instructions] | more)
        yield


def case(tokens, ranks, outputs, dtype, bits, *, density=0.7, size=1.0, group=64):
    generator = torch.Generator().manual_seed(ranks + outputs)
    v = (torch.randn(tokens, ranks, generator=generator) * size).to(dtype)
    tau = torch.where(torch.rand(ranks, generator=generator) < density, 0.0, math.inf)
    values = torch.randn(ranks, outputs, generator=generator) / math.sqrt(ranks)
    weight, scale = every_number(*(pack(values, 8) if bits == 8 else pack(values, 4, group=group)), generator)
    return Product(v, tau, weight, scale, torch.randn(outputs, generator=generator).to(dtype))


def sizes(bits):
    """Fewer ranks than are multiplied at once, a multiple of them and more; columns that end within a vector and a group."""
    return [
        case(1, 15, 34, torch.float32, bits),
        case(1, 16, 2, torch.float32, bits, density=1.0),
        case(3, 97, 130, torch.bfloat16, bits),
        case(1, 250, 576, torch.float32, bits, group=128),
        case(1, 610, 200, torch.bfloat16, bits),  # in two parts, of which the last kept rows are fewer than 16
        case(3, 300, 130, torch.float32, bits, density=0.1),
        case(1, 300, 70, torch.float16, bits, density=0.0),
        case(2, 40, 4500, torch.float16, bits, density=1.0),
        case(8, 65, 1030, torch.float32, bits),
    ]


def odd_values(bits):
    """Too large or too small for a step in fp32; zeros; and a few of them among others."""
    cases = [case(1, 48, 130, torch.float32, bits, size=size) for size in (1e-37, 1e32, 0.0)]
    mixed = case(2, 64, 130, torch.float32, bits, density=1.0)
    mixed.v[0, 3], mixed.v[1, 20], mixed.v[:, 32:48] = 1e31, 0.0, 0.0
    return [*cases, mixed]


def diagonal():
    """Column n reads rank n alone: the result is its coefficient."""
    v = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    weight, scale = torch.diag(torch.full((64,), 127, dtype=torch.int8)), torch.full((64,), 1 / 127)
    return Product(v, torch.zeros(64), weight, scale, torch.zeros(64))


def routers(bits):
    """x, weight, scale. Rows that end within a vector, which AVX2 leaves to fp32; inputs that only fp32 holds; one of them not a
    number."""
    given = []
    for tokens, ranks, width in [(1, 5, 576), (1, 1, 64), (3, 33, 130), (8, 18, 256), (2, 7, 64)]:
        generator = torch.Generator().manual_seed(width)
        weight, scale = every_number(*pack(torch.randn(ranks, width, generator=generator) / width**0.5, bits), generator)
        given.append((torch.randn(tokens, width, generator=generator), weight, scale))
    given[-1][0].mul_(1e-37)
    given.append((given[0][0].clone(), *given[0][1:]))
    given[-1][0][0, 70] = math.nan
    return given


def either(*operands):
    return masked_gemv(*operands) if len(operands) == 5 else router(*operands)


@pytest.fixture(scope="module")
def found(instructions):
    """Results by the function above that made their operands and by bits: all are one graph, compiled once."""
    given = {(make, bits): make(bits) for make in (sizes, odd_values, routers) for bits in BITS} | {(diagonal, 8): [diagonal()]}
    operands = [one.operands if isinstance(one, Product) else one for cases in given.values() for one in cases]
    with compiling_for(instructions):
        results, code = each(either, operands)
    assert calls(code, GEMV) == sum(len(one) == 5 for one in operands) and calls(code, ROUTER) == len(BITS) * 6
    for marker in (GEMV, ROUTER):
        sources = [source for source in code.split("async_compile.cpp_pybinding(") if marker in source]
        with_mark = {name: sum(mark in source for source in sources) for name, mark in MARKS.items()}
        # a router whose rows end within a vector is left to fp32 by AVX2, one of each number of bits
        left_out = len(BITS) if (marker, instructions) == (ROUTER, "maddubs") else 0
        assert with_mark == {name: (len(sources) - left_out) * (name == instructions) for name in MARKS}
    left = iter(results)
    return {key: [next(left) for _ in cases] for key, cases in given.items()}


@pytest.mark.parametrize("bits", BITS)
def test_matches_fp64(found, bits):
    for one, got in zip(sizes(bits), found[sizes, bits], strict=True):
        one.check(got)


@pytest.mark.parametrize("bits", BITS)
def test_values_that_integers_do_not_hold(found, bits):
    for one, got in zip(odd_values(bits), found[odd_values, bits], strict=True):
        one.check(got)


@pytest.mark.parametrize("bits", BITS)
def test_routers_match_fp64(found, bits):
    *results, nan = found[routers, bits]
    for (x, weight, scale), got in zip(routers(bits)[:-1], results, strict=True):
        w = unpack(weight, scale, torch.float64)
        assert_close("z", got, x.double() @ w.t(), x.double().abs() @ w.abs().t(), terms=x.shape[-1])
    assert bool(nan.isnan().all())


@pytest.mark.parametrize("passes", [2, 3])
def test_error_of_a_coefficient(instructions, found, passes):
    """It is within the stated part of the largest of its 16 ranks. In fp32 there are three passes."""
    if instructions == "none":
        pytest.skip("no integers")
    one = diagonal()
    if passes == 3:
        assert integers.facts(torch.float32)["passes"] == 3
        (got,) = found[diagonal, 8]
    else:
        with compiling_for(instructions, passes=passes):
            ((got,), code) = each(masked_gemv, [one.operands])
        assert calls(code, GEMV) == 1
    error = (got.double() - one.v.double()).abs()[0].view(4, 16)
    largest = one.v.abs()[0].view(4, 16).amax(1, keepdim=True).double()
    eps = torch.finfo(torch.float32).eps
    bound = largest / (2 * 127 * 254 ** (passes - 1)) + 4 * eps * largest  # and rounding of the scale, a step and the sum
    assert bool((error <= bound).all())
    assert float((error / largest).max()) > (1e-6 if passes == 2 else 0)  # it is the rounding of two integers that is seen
