"""Every lowering of our operations through Inductor, in every storage: a graph of all of them against fp64.

An operation that is registered with Inductor and is missing in the graph fails the test.
"""

from __future__ import annotations

import pytest
import torch
from torch._inductor.lowering import lowerings

from rana_fx.formats import pack, unpack
from rana_fx.kernels import ops
from rana_fx.kernels.attention import decode_attention
from rana_fx.passes import lower
from tests.support.adapted import relative
from tests.support.inductor import GEMV, ROUTER, ROWS, calls, compiled

WIDTH, OUT = 96, 256
SPARSE = 0.01  # a density at which kept rows are expected to be faster
FUSED = (ops.masked_gemv_add, ops.masked_gemv_gated, ops.masked_gemv_normed, ops.normed_router)
PACKED = (ops.masked_gemv, *FUSED, ops.router)


def cases(tokens, bits, dtype):
    """(operation, operands, the same in fp64 as they are stored)."""
    generator = torch.Generator().manual_seed(bits)

    def randn(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    def matrix(*size):
        values = randn(*size, scale=size[0] ** -0.5)
        return (values, None) if bits == 16 else pack(values, bits)

    def product():
        tau = torch.rand(WIDTH, generator=generator)
        return randn(tokens, WIDTH), tau, *matrix(WIDTH, OUT), randn(OUT)

    for op, more in (
        (ops.masked_gemv, ()),
        (ops.masked_gemv_add, (randn(tokens, OUT),)),
        (ops.masked_gemv_gated, ("silu",)),
    ):
        v, tau, weight, scale, bias = product()
        exact = (v.double(), tau, unpack(weight, scale, torch.float64), bias.double(), None, 0.5, *map(wide, more))
        yield op, (v, tau, weight, bias, scale, 0.5, *more), exact
    v, tau, weight, scale, bias = product()
    gain, more = randn(WIDTH), ("silu" if bits == 4 else None, 1e-5, 1.0)
    # values above every threshold or below, whatever the rounding of the norm
    tau = torch.where(torch.arange(WIDTH) % 2 == 0, 0.0, torch.inf)
    exact = (v.double(), wide(gain), tau, unpack(weight, scale, torch.float64), bias.double(), None, 0.5, *more)
    yield ops.masked_gemv_normed, (v, gain, tau, weight, bias, scale, 0.5, *more), exact
    for op, gain, more in ((ops.router, (), ()), (ops.normed_router, (randn(WIDTH),), (1e-5, 1.0))):
        x, (weight, scale) = randn(tokens, WIDTH), matrix(64, WIDTH)
        exact = (x.double(), *map(wide, gain), unpack(weight, scale, torch.float64), None, *more)
        yield op, (x, *gain, weight, scale, *more), exact
    if bits == 16:
        gate = torch.where(torch.rand(tokens, OUT, generator=generator) < 0.3, randn(tokens, OUT), 0)
        given = (randn(tokens, WIDTH), gate, randn(OUT, WIDTH, scale=WIDTH**-0.5), randn(OUT), SPARSE)
        yield ops.masked_rows, given, tuple(map(wide, given))
        (v, *first), (_, *second) = product(), product()
        parts = [[one, other] for one, other in zip(first, second, strict=True)]
        taus, weights, _, biases = parts
        exact = (v.double(), taus, [wide(w) for w in weights], [wide(b) for b in biases], 0.5)
        yield ops.masked_gemv_parts, (v, taus, weights, biases, 0.5), exact


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) else value


# number of tokens, bits, dtype: all of a graph
GRAPHS = {
    "few tokens": ((1, 16, torch.float32), (3, 16, torch.bfloat16), (3, 8, torch.bfloat16), (1, 4, torch.float32)),
    "many tokens": ((40, 16, torch.float32),),
    "many tokens, packed": ((40, 8, torch.float32), (40, 4, torch.bfloat16)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_lowering_computes_what_is_stored(name):
    given = [(case, (tokens, bits, dtype)) for tokens, bits, dtype in GRAPHS[name] for case in cases(tokens, bits, dtype)]

    def everything():
        return [op(*operands) for (op, operands, _), _ in given]

    results, code = compiled(everything)
    for asked in GRAPHS[name]:
        assert {op for (op, _, _), one in given if one == asked} == (set(PACKED) if asked[1] < 16 else registered())
    few = name == "few tokens"
    # a matmul for each of two parts; many tokens are a dense matmul, or the eager operation for a quantised weight
    assert calls(code, GEMV) == few * (6 + 6 + 4 + 4)
    assert calls(code, ROUTER) == few * 2 * 4
    assert calls(code, ROWS) == few * 2
    assert ("torch.ops.rana" in code) == (name == "many tokens, packed")
    with ops.implementation("reference"):
        for ((op, _, exact), (_, _, dtype)), result in zip(given, results, strict=True):
            # a result and the sums before its last step are rounded
            assert relative(result, op(*exact)) < (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps), op


def registered():
    """Our operations with a stored weight that Inductor lowers."""
    lower.register()
    return {op for op in lowerings if isinstance(op, torch._ops.OpOverload) and op.namespace == "rana"} - {decode_attention}
