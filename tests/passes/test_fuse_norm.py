"""Norms into routers and residuals into products: which spellings are taken, which are left, and that values stay."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from rana_fx.kernels.ops import masked_gemv, router
from rana_fx.passes import lower
from tests.support.graphs import NONE, Fusing, fuse, fused, mask, ops_of
from tests.support.products import DTYPES, assert_close

WIDTH, RANKS, FFN, EPS = 48, 20, 32, 1e-5


def llama(h, g):
    wide = h.to(torch.float32)
    return g * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype)


def gemma(h, g):
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + g.float())).type_as(h)


def gain_before_cast(h, g):
    wide = h.float()
    return (g.float() * (wide * (wide * wide).mean(dim=-1, keepdim=True).add(EPS).rsqrt())).to(h.dtype)


def gain_times_root(h, g):
    root = torch.rsqrt(h.float().square().mean(-1, keepdim=True) + EPS)
    return (h.float() * (root * g)).to(h.dtype)


def without_gain(h, g):
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(2, keepdim=True) + EPS)).to(h.dtype)


def functional(h, g):
    return rms_norm(h, (WIDTH,), g, EPS)


def in_the_dtype(h, g):
    return h * torch.rsqrt((h * h).mean(-1, keepdim=True) + EPS) * g


def power(h, g):
    return h * torch.pow(h.float().square().mean(-1, keepdim=True) + EPS, -0.5).to(h.dtype) * g


def reciprocal(h, g):
    return (h * (h.float().square().mean(-1, keepdim=True) + EPS).sqrt().reciprocal()).to(h.dtype) * g


NORMS = {
    norm.__name__: norm
    for norm in (llama, gemma, gain_before_cast, gain_times_root, without_gain, functional, in_the_dtype, power, reciprocal)
}


def norm_operands(dtype, lead=(1, 2)):
    h, g = torch.randn(*lead, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    return h, g, (torch.randn(RANKS, WIDTH) / WIDTH**0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
def test_norm_is_taken_into_its_router(name, dtype):
    h, g, b = norm_operands(dtype)
    module, counts = fused(lambda h, g, b: router(NORMS[name](h, g), b), h, g, b)
    assert counts == NONE | {"norm": 1}
    assert ops_of(module) == ["normed_router"]
    # h or g cast is no cast where all is fp32 already
    assert sum(node.op == "call_function" for node in module.graph.nodes) == 1
    x = h.double() / (h.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    x = x * {"gemma": 1 + g.double(), "without_gain": 1.0}.get(name, g.double())
    # the sum of the norm errs as the sum of the product does
    magnitude = 2 * x.abs() @ b.double().abs().t()
    assert_close("z", module(h, g, b), x @ b.double().t(), magnitude, terms=WIDTH)


def test_every_router_of_a_norm_takes_it():
    h, g, b = norm_operands(torch.bfloat16)

    def two(h, g, b):
        x = llama(h, g)
        return router(x, b), router(x.view(2, WIDTH), b)

    module, counts = fused(lambda h, g, b: (router(x := llama(h, g), b), router(x, b[:3])), h, g, b)
    assert counts == NONE | {"norm": 2}
    assert ops_of(module) == ["normed_router"] * 2
    # a view in between is another reader of the norm
    assert fused(two, h, g, b)[1] == NONE


def test_a_norm_that_changes_the_dtype_is_left():
    """The fused router gives what it reads, so its result would be wider than the router's."""
    h, g, b = norm_operands(torch.bfloat16)
    module, counts = fused(lambda h, g, b: router(llama(h, g).to(b.dtype), b), h.float(), g.float(), b)
    assert counts == NONE
    assert module(h.float(), g.float(), b).dtype == torch.bfloat16


LEFT = {
    # a rounding that was asked for
    "fp8 in between": lambda h, g, b: router(llama(h, g).to(torch.float8_e4m3fn).to(b.dtype), b),
    "layer norm": lambda h, g, b: router(layer_norm(h, (WIDTH,), g, g, EPS), b),
    "another reader": lambda h, g, b: (router(x := llama(h, g), b), x + 1),
    "another tensor": lambda h, g, b: router(h * torch.rsqrt((h + 1).square().mean(-1, keepdim=True) + EPS), b),
    "another power": lambda h, g, b: router(h * torch.rsqrt(h.pow(4).mean(-1, keepdim=True) + EPS), b),
    "over tokens": lambda h, g, b: router(h * torch.rsqrt(h.square().mean(1, keepdim=True) + EPS), b),
    "over all": lambda h, g, b: router(h * torch.rsqrt(h.square().mean((1, 2), keepdim=True) + EPS), b),
    "a gain per token": lambda h, g, b: router(llama(h, g) * h[..., :1], b),
    "two gains": lambda h, g, b: router(llama(h, g) * b[0], b),
    "two roots": lambda h, g, b: router(h * (root := torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)) * root, b),
    "a square": lambda h, g, b: router(h * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS), b),
    "scaled": lambda h, g, b: router(llama(h, g) * 2, b),
    "shifted": lambda h, g, b: router(llama(h, g) + 1, b),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_norm_is_left(name):
    h, g, b = norm_operands(torch.float32)
    module, counts = fused(LEFT[name], h, g, b)
    assert counts == NONE
    assert ops_of(module) == ["router"]


@pytest.mark.parametrize(("lead", "count"), [((), 1), ((4,), 1), ((2, 2), 1), ((5,), 0), ((3, 2), 0), ((0,), 0)])
def test_few_tokens(lead, count):
    h, g, b = norm_operands(torch.float32, lead)

    def norm(h, g, b):
        return router(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * g, b)

    assert fused(norm, h, g, b)[1] == NONE | {"norm": count}
    v, tau, w = torch.randn(*lead, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH)
    assert fused(lambda r, *operands: r + masked_gemv(*operands), h, v, tau, w)[1] == NONE | {"residual": count}
    w = torch.randn(RANKS, 2 * FFN)
    gated = fused(lambda *operands: silu((y := masked_gemv(*operands))[..., :FFN]) * y[..., FFN:], v, tau, w)[1]
    assert gated == NONE | {"gated": count}


def test_another_device_is_left():
    operands = torch.randn(1, WIDTH), torch.randn(1, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH)
    module = make_fx(lambda r, *operands: r + masked_gemv(*operands), tracing_mode="fake")(*operands)
    assert fuse(module, devices=("cuda",)) == NONE


RESIDUALS = {
    "left": lambda r, v, tau, w, c: r + masked_gemv(v, tau, w, c),
    "right": lambda r, v, tau, w, c: masked_gemv(v, tau, w, c) + r,
    "by name": lambda r, v, tau, w, c: torch.add(r, masked_gemv(v, tau, weight=w, bias=c, density=0.25)),
    "in place": lambda r, v, tau, w, c: masked_gemv(v, tau, w, c).add(r),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_is_taken_into_the_product(name, dtype):
    r, v = torch.randn(1, 3, WIDTH).to(dtype), torch.randn(1, 3, RANKS).to(dtype)
    tau, w, c = mask(RANKS), torch.randn(RANKS, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    module, counts = fused(RESIDUALS[name], r, v, tau, w, c)
    assert counts == NONE | {"residual": 1}
    assert ops_of(module) == ["masked_gemv_add"]
    node = next(node for node in module.graph.nodes if node.op == "call_function")
    assert node.args[5] == (0.25 if name == "by name" else 0.5)
    kept = torch.where(tau == 0, v.double(), 0)
    exact = r.double() + kept @ w.double() + c.double()
    magnitude = r.double().abs() + kept.abs() @ w.double().abs() + c.double().abs()
    assert_close("y", module(r, v, tau, w, c), exact, magnitude, terms=RANKS + 2)


KEPT = {
    "another reader": lambda r, *operands: (r + (y := masked_gemv(*operands)), y * 2),
    "scaled": lambda r, *operands: torch.add(r, masked_gemv(*operands), alpha=2),
    "a number": lambda r, *operands: masked_gemv(*operands) + 1.0,
    "one for all tokens": lambda r, *operands: masked_gemv(*operands) + r[0, :1],
    "wider": lambda r, *operands: masked_gemv(*operands) + r.double(),
    "itself": lambda r, *operands: (y := masked_gemv(*operands)) + y,
    "a difference": lambda r, *operands: r - masked_gemv(*operands),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_sums_are_left(name):
    r, v, tau, w = torch.randn(1, 3, WIDTH), torch.randn(1, 3, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH)
    module, counts = fused(KEPT[name], r, v, tau, w)
    assert counts == NONE
    assert ops_of(module) == ["masked_gemv"]


def test_sums_of_two_products():
    r, v, tau, w = torch.randn(2, WIDTH), torch.randn(2, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH)

    def parallel(r, v, tau, w):
        return masked_gemv(v, tau, w) + masked_gemv(v * 2, tau, w) + r

    module, counts = fused(parallel, r, v, tau, w)
    assert counts["residual"] in (1, 2)
    torch.testing.assert_close(module(r, v, tau, w), parallel(r, v, tau, w))

    def in_turn(r, v, tau, w):
        return r + masked_gemv(v, tau, w) + masked_gemv(v * 2, tau, w)

    module, counts = fused(in_turn, r, v, tau, w)
    assert counts == NONE | {"residual": 2}
    torch.testing.assert_close(module(r, v, tau, w), in_turn(r, v, tau, w))


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
            gate, up = masked_gemv(router(llama(r, g), b), tau, w).chunk(2, -1)
            r = r + masked_gemv(silu(gate) * up, tau2, w2)
        return r

    return run, (torch.randn(1, 1, WIDTH), *(parameters() for _ in range(layers)))


@pytest.mark.parametrize("layers", [1, 3])
def test_counts_follow_the_depth(layers):
    run, inputs = model(layers)
    module, counts = fused(run, *inputs)
    assert counts == {"norm": layers, "residual": layers, "gated": layers, "same_input": 0}
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
    assert fusing.counted == [{"norm": 1, "residual": 1, "gated": 4, "same_input": 0}]
    torch.testing.assert_close(got, all_of_them(r, v, tau, w, *layers), rtol=1e-4, atol=1e-4)
