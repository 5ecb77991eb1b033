"""All fusing passes in the order of ``POST_GRAD``, for calls with few tokens, and through Inductor."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu, silu

from rana_fx.kernels.ops import masked_gemv, router
from rana_fx.passes import lower
from tests.support.graphs import NONE, Fusing, fuse, fused, mask, ops_of, reasons, traced

WIDTH, RANKS, FFN, EPS = 48, 20, 32, 1e-5


@pytest.mark.parametrize(("lead", "count"), [((), 1), ((4,), 1), ((2, 2), 1), ((5,), 0), ((3, 2), 0), ((0,), 0)])
def test_few_tokens(lead, count):
    h, g, b = torch.randn(*lead, WIDTH), torch.randn(WIDTH), torch.randn(RANKS, WIDTH)
    assert fused(lambda h, g, b: router(norm(h, g), b), h, g, b)[1] == NONE | {"norm": count}
    v, tau, w = torch.randn(*lead, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH)
    assert fused(lambda r, *operands: r + masked_gemv(*operands), h, v, tau, w)[1] == NONE | {"residual": count}
    w = torch.randn(RANKS, 2 * FFN)
    gated = fused(lambda *operands: silu((y := masked_gemv(*operands))[..., :FFN]) * y[..., FFN:], v, tau, w)[1]
    assert gated == NONE | {"gated": count}


@pytest.mark.parametrize(("lead", "reason"), [((5,), "5 tokens, where kernels take 1 to 4"), ((3, 2), "6 "), ((0,), "0 ")])
def test_many_tokens_are_a_reason(lead, reason):
    operands = torch.randn(*lead, WIDTH), torch.randn(*lead, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH), torch.randn(3, WIDTH)
    module = traced(lambda r, v, tau, w, b: (r + masked_gemv(v, tau, w), router(r, b)), *operands)
    everything = reasons(module)
    assert everything.pop("repeated_heads") == []  # there is no attention
    for found in everything.values():
        assert len(found) == 1 and found[0].startswith(reason)


def test_a_varying_number_of_tokens_is_a_reason():
    operands = torch.randn(3, WIDTH), torch.randn(3, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH)
    module = make_fx(lambda r, *operands: r + masked_gemv(*operands), tracing_mode="symbolic")(*operands)
    assert reasons(module)["residual"] == ["the number of tokens varies"]


def test_another_device_is_left():
    operands = torch.randn(1, WIDTH), torch.randn(1, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH)
    module = make_fx(lambda r, *operands: r + masked_gemv(*operands), tracing_mode="fake")(*operands)
    assert fuse(module, devices=("cuda",)) == NONE
    found = set(itertools.chain(*reasons(module, devices=("cuda",)).values()))
    assert found and all(re.fullmatch(r"it is on cpu, where nothing computes \w+ in one launch", reason) for reason in found)


def test_what_is_dead_shares_no_launch():
    """A matmul without users after the fusion of a gate is not combined with another matmul of its tensor."""
    v, tau, w, other = torch.randn(1, RANKS), mask(RANKS), torch.randn(RANKS, 2 * FFN), torch.randn(RANKS, WIDTH)

    def parallel(v, tau, w, other):
        gate, up = masked_gemv(v, tau, w).chunk(2, -1)
        return silu(gate) * up, masked_gemv(v, tau, other) * 2

    module, counts = fused(parallel, v, tau, w, other)
    assert counts == NONE | {"gated": 1}
    assert sorted(ops_of(module)) == ["masked_gemv", "masked_gemv_gated"]


def norm(h, g):
    wide = h.to(torch.float32)
    return g * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype)


def model(layers):
    """(function, inputs): layers of norm, router, gated product, product, residual."""

    def parameters():
        return (
            torch.randn(WIDTH),
            torch.randn(RANKS, WIDTH) / WIDTH**0.5,
            mask(RANKS),
            torch.randn(RANKS, 2 * FFN) / RANKS**0.5,
            mask(FFN),
            torch.randn(FFN, WIDTH) / FFN**0.5,
        )

    def run(r, *all_of_them):
        for g, b, tau, w, tau2, w2 in all_of_them:
            gate, up = masked_gemv(router(norm(r, g), b), tau, w).chunk(2, -1)
            r = r + masked_gemv(silu(gate) * up, tau2, w2)
        return r

    return run, (torch.randn(1, 1, WIDTH), *(parameters() for _ in range(layers)))


@pytest.mark.parametrize("layers", [1, 3])
def test_counts_follow_the_depth(layers):
    run, inputs = model(layers)
    module, counts = fused(run, *inputs)
    assert counts == NONE | {"norm": layers, "residual": layers, "gated": layers}
    assert ops_of(module) == ["normed_router", "masked_gemv_gated", "masked_gemv_add"] * layers
    # one of each, and nothing between them
    assert sum(node.op == "call_function" for node in module.graph.nodes) == 3 * layers
    torch.testing.assert_close(module(*inputs), run(*inputs), rtol=1e-4, atol=1e-4)


def test_inductor_lowers_what_was_fused():
    fusing = Fusing()
    run, (r, *layers) = model(1)
    v, tau, w = torch.randn(1, 1, RANKS), mask(RANKS), torch.randn(RANKS, 2 * FFN)

    def all_of_them(r, v, tau, w, *layers):
        halves = (
            masked_gemv(v, tau, w).chunk(2, -1),
            masked_gemv(v + 1, tau, w).chunk(2, -1),
            masked_gemv(-v, tau, w).chunk(2, -1),
        )
        acts = torch.relu, gelu, functools.partial(gelu, approximate="tanh")
        return run(r, *layers), *(act(gate) * up for act, (gate, up) in zip(acts, halves, strict=True))

    lower.register()
    compiled = torch.compile(all_of_them, options={"post_grad_custom_pre_pass": fusing})
    with torch.no_grad():
        got = compiled(r, v, tau, w, *layers)
    assert fusing.counted == [NONE | {"norm": 1, "residual": 1, "gated": 4}]
    torch.testing.assert_close(got, all_of_them(r, v, tau, w, *layers), rtol=1e-4, atol=1e-4)
