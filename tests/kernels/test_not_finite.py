"""NaN and infinities come out of every implementation as of the dense model: an element is dropped where its square is a number
below its threshold, and nowhere else. Places and signs are compared with fp64, in every storage; the rest to rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.apply import gate_mask
from rana_fx.formats import pack, unpack
from rana_fx.kernels import ops
from rana_fx.kernels.ops import (
    implementation,
    masked_gemv,
    masked_gemv_add,
    masked_gemv_gated,
    masked_gemv_normed,
    masked_gemv_parts,
    masked_rows,
    normed_router,
    router,
)
from rana_fx.kernels.reference import ACTIVATIONS, kept
from tests.support.inductor import GEMV, ROUTER, ROWS, calls, each, repeated
from tests.support.products import kernels_run_on

NAN, INF = math.nan, math.inf
K, N, R, COLUMNS = 33, 128, 3, 12
# where it is put: (tokens, ranks), and what
POISONS = {
    "nothing": ((), 0.0),
    "one NaN": ((0, 7), NAN),
    "one infinity": ((0, 7), INF),
    "one negative infinity": ((-1, 8), -INF),
    "a rank": ((slice(None), 11), NAN),
    "a token": ((-1,), NAN),
    "everything": ((), NAN),
    "infinite everywhere": ((), INF),
}
DENSITY = 0.01  # at which kept rows are expected to win


def poisoned(values, name):
    where, what = POISONS[name]
    values = values.clone()
    if name != "nothing":
        values[where] = what
    return values


def both_signs(values):
    """Infinities of either sign in one row: their sum is NaN."""
    values = values.clone()
    values[0, 3], values[0, 4] = INF, -INF
    return values


def tokens_of(count, width, dtype):
    """Every way of being poisoned, for so many tokens."""
    plain = torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)
    return {name: poisoned(plain, name) for name in POISONS} | {"both signs": both_signs(plain)}


def thresholds(count=K):
    """From none to infinite: what is poisoned lies at each of them. A quarter of the ranks is never kept, but for NaN and Inf."""
    return torch.tensor([0.0, 0.3, 2.0, INF]).repeat(-(-count // 4))[:count]


def stored(rows, columns, bits, dtype):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype) / rows**0.5
    return (values, None) if bits == 16 else pack(values, bits)


def dropped(v, tau):
    return torch.where(v.double().square() < tau.double(), 0.0, v.double())


def exact_gemv(v, tau, weight, scale=None, bias=None):
    y = dropped(v, tau) @ unpack(weight, scale, torch.float64)
    return y if bias is None else y + bias.double()


def assert_same(name, got, exact):
    """NaN and infinities in the same places; elsewhere 4 eps of the dtype and of sums of K terms in fp32, of a size about 1."""
    got = got.double().reshape(exact.shape).cpu()
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(what(got), what(exact)), f"{name}: {what.__name__}"
    finite = exact.isfinite()
    torch.testing.assert_close(got[finite], exact[finite], rtol=2e-2, atol=2e-2, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference(dtype):
    """The mask itself, and each operation by plain PyTorch."""
    assert kept(torch.tensor([NAN, INF, -INF, 0.0, 1.0, 3.0], dtype=dtype), torch.tensor(4.0)).tolist() == [True] * 3 + [
        False,
        False,
        True,
    ]
    assert kept(torch.tensor([NAN, INF], dtype=dtype), torch.tensor(INF)).tolist() == [True, True]
    with implementation("reference"):
        check_eager(dtype, torch.device("cpu"))


def test_triton(device):
    kernels_run_on(device)
    # the interpreter is slow
    tokens = (3,) if device.type == "cpu" else (1, 3, 6)
    with implementation("triton"), np.errstate(invalid="ignore", over="ignore"):
        check_eager(torch.float32, device, tokens=tokens)


def check_eager(dtype, device, *, tokens=(1, 3, 6)):
    """Every operation as the chosen implementation computes it."""
    for count in tokens:
        check_tokens(count, dtype, device)


def check_tokens(tokens, dtype, device):
    tau, bias = thresholds(), torch.ones(N, dtype=dtype)

    def run(op, *operands):
        moved = [
            value.to(device)
            if isinstance(value, torch.Tensor)
            else [part.to(device) for part in value]
            if isinstance(value, list)
            else value
            for value in operands
        ]
        return op(*moved)

    for name, v in tokens_of(tokens, K, dtype).items():
        for bits in (16, 8, 4):
            weight, scale = stored(K, N, bits, dtype)
            exact = exact_gemv(v, tau, weight, scale, bias)
            assert_same(f"{name}, {bits}", run(masked_gemv, v, tau, weight, bias, scale), exact)
            residual = poisoned(torch.ones(tokens, N, dtype=dtype), "one infinity")
            got = run(masked_gemv_add, v, tau, weight, bias, scale, 0.5, residual)
            assert_same(f"add, {name}, {bits}", got, exact + residual.double())
            rows, row_scale = stored(R, K + 1, bits, dtype)
            x = torch.cat([v, torch.ones(tokens, 1, dtype=dtype)], -1)
            w = unpack(rows, row_scale, torch.float64)
            assert_same(f"router, {name}, {bits}", run(router, x, rows, row_scale), x.double() @ w.t())
            normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
            got = run(normed_router, x, None, rows, row_scale, 1e-5, 0.0)
            assert_same(f"norm, {name}, {bits}", got, normed @ w.t())
            unit = v.double() / (v.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
            got = run(masked_gemv_normed, v, None, tau * 0, weight, bias, scale, 0.5, None, 1e-5, 0.0)
            assert_same(f"product of a norm, {name}, {bits}", got, exact_gemv(unit, tau * 0, weight, scale, bias))
        first, second = stored(K, 5, 16, dtype)[0], stored(K, N, 16, dtype)[0]
        taus = [tau, tau.flip(0)]
        exact = torch.cat([exact_gemv(v, *part) for part in zip(taus, (first, second), strict=True)], -1)
        assert_same(f"parts, {name}", run(masked_gemv_parts, v, taus, [first, second], [], 0.5), exact)
    check_rows(tokens, dtype, lambda *operands: run(masked_rows, *operands))


def rows_of(tokens, dtype):
    """(name, operands of masked_rows, fp64): the gate poisoned, what is multiplied poisoned, both."""
    weight, bias = stored(COLUMNS, K, 16, dtype)[0], torch.ones(COLUMNS, dtype=dtype)
    gates, inputs = tokens_of(tokens, COLUMNS, dtype), tokens_of(tokens, K, dtype)
    for gate, x in (*((name, "nothing") for name in gates), *(("nothing", name) for name in inputs), ("one NaN", "one infinity")):
        a = torch.where(torch.arange(COLUMNS) % 3 == 0, 0.0, gates[gate]).to(dtype)
        up = inputs[x].double() @ weight.double().t() + bias.double()
        exact = torch.where(a != 0, a.double() * up, 0.0)
        yield f"rows, {gate}, {x}", (inputs[x], a, weight, bias, DENSITY), exact


def check_rows(tokens, dtype, run):
    for name, operands, exact in rows_of(tokens, dtype):
        assert_same(name, run(*operands), exact)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_triton_activations(device, name):
    """In the launch of the product, with and without slices."""
    kernels_run_on(device)
    gate = torch.tensor([NAN, INF, -INF, 0.0, -3.0, 2.0, 1.0, 1.0])
    up = torch.tensor([1.0, 2.0, 1.0, INF, NAN, -INF, NAN, 3.0])
    bias = torch.cat([gate, up])
    for ranks in (1, 64):
        v, tau, weight = torch.zeros(1, ranks), torch.zeros(ranks), torch.zeros(ranks, 16)
        with implementation("triton"), np.errstate(invalid="ignore"):
            given = (value.to(device) for value in (v, tau, weight, bias))
            got = masked_gemv_gated(*given, None, 0.5, name)
        assert_same(name, got[0], ACTIVATIONS[name](gate.double()) * up.double())


# of the compiled tests below: one graph of all storages and numbers of tokens runs with every poison
BITS, WAYS = (16, 8, 4), (*POISONS, "both signs")


def test_cpp():
    """The masked product and the router."""

    def operands(way, tokens, bits):
        v = tokens_of(tokens, K, torch.bfloat16 if tokens == 3 else torch.float32)[way]
        (weight, scale), tau = stored(K, N, bits, v.dtype), thresholds()
        return v, tau, weight, None, scale, torch.cat([v, v[:, :1]], -1), *stored(R, K + 1, bits, v.dtype)

    given = [[operands(way, tokens, bits) for tokens in (1, 3) for bits in BITS] for way in WAYS]
    results, code = repeated(lambda *both: (masked_gemv(*both[:5]), router(*both[5:])), given)
    assert calls(code, GEMV) == calls(code, ROUTER) == 2 * len(BITS)
    for way, cases, found in zip(WAYS, given, results, strict=True):
        for index, ((v, tau, weight, _, scale, x, rows, row_scale), (y, z)) in enumerate(zip(cases, found, strict=True)):
            assert_same(f"masked_gemv, {way}, {index}", y, exact_gemv(v, tau, weight, scale))
            assert_same(f"router, {way}, {index}", z, x.double() @ unpack(rows, row_scale, torch.float64).t())


def test_rows_cpp():
    """40 tokens are a matmul."""
    cases = list(zip(*(rows_of(tokens, torch.float32) for tokens in (1, 3, 40)), strict=True))
    results, code = repeated(masked_rows, [[operands for _, operands, _ in case] for case in cases])
    assert calls(code, ROWS) == 2
    for case, found in zip(cases, results, strict=True):
        for (name, _, exact), got in zip(case, found, strict=True):
            assert_same(f"{name}, {len(exact)} tokens", got, exact)


def test_matmul():
    """Many tokens, and the fused forms, as they are lowered without a kernel of ours."""

    def everything(v, tau, weight, bias, scale):
        y = masked_gemv(v, tau, weight, bias, scale)
        gated = masked_gemv_gated(v, tau, weight, bias, scale, 0.5, "relu")
        return y, gated, masked_gemv_add(v, tau, weight, bias, scale, 0.5, y.detach())

    def operands(way, bits):
        v = tokens_of(40, K, torch.float32)[way]
        weight, scale = stored(K, N, bits, v.dtype)
        return v, thresholds(), weight, None, scale

    given = [[operands(way, bits) for bits in BITS] for way in WAYS]
    results, code = repeated(everything, given)
    assert calls(code, GEMV) == 0
    for way, cases, found in zip(WAYS, given, results, strict=True):
        for bits, (v, tau, weight, _, scale), (y, gated, added) in zip(BITS, cases, found, strict=True):
            wanted = exact_gemv(v, tau, weight, scale)
            assert_same(f"matmul, {way}, {bits}", y, wanted)
            first, second = wanted.chunk(2, -1)
            assert_same(f"gated, {way}, {bits}", gated, torch.relu(first) * second)
            assert_same(f"added, {way}, {bits}", added, wanted + wanted)


def test_the_mask_of_a_gate():
    a = torch.tensor([NAN, INF, -INF, 0.1, 3.0])
    expected = torch.tensor([NAN, INF, -INF, 0.0, 3.0])
    for tau in (torch.tensor(1.0), torch.full((5,), 1.0)):
        assert_same("eager", gate_mask(a, tau), expected.double())
    got, _ = each(gate_mask, [(a, torch.tensor(1.0))])
    assert_same("compiled", got[0], expected.double())


def test_gradients_reach_what_is_kept():
    v = torch.tensor([[NAN, 0.1, 3.0]], requires_grad=True)
    masked_gemv(v, torch.ones(3), torch.ones(3, 2)).sum().backward()
    assert v.grad.tolist() == [[2.0, 0.0, 2.0]]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        return x.nan_to_num(nan=0.0) + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.usefixtures("graphs_as_rewritten")
@pytest.mark.parametrize("recipe", ["paper", "teal", "cats", "static", "wina"])
@pytest.mark.parametrize("tokens", [1, 30])
def test_models(recipe, tokens):
    """One element of one token is NaN: that token's output is, as the dense model's, and no other."""
    model = Mlp().eval()
    rana_fx.adapt(model, [(torch.randn(32, 16),) for _ in range(8)], budget=0.7, recipe=recipe, progress=False)
    x = torch.randn(tokens, 16)
    x[0, 3] = NAN
    with torch.no_grad():
        got = torch.compile(model, backend=rana_fx.backend)(x)
        assert torch.equal(got.isnan(), model(x).isnan())
    assert int(got.isnan().sum()) == 16


def test_all_operations_are_here():
    """A new operation needs a case above."""
    fused = {masked_gemv_add, masked_gemv_gated, masked_gemv_normed, masked_gemv_parts, normed_router}
    assert {masked_gemv, masked_rows, router} | fused == {getattr(torch.ops.rana, name).default for name in ops._SCHEMAS}
