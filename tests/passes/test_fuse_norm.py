"""Fusion of norms into routers: forms that are fused, forms that are not and the reasons, and unchanged values."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from rana_fx.kernels.ops import router
from tests.support.graphs import NONE, fused, ops_of, reasons
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
    # the error of the norm's sum has the same bound as that of the matmul
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
    """The fused router returns the dtype of its input, which would be wider than the router's."""
    h, g, b = norm_operands(torch.bfloat16)
    given = h.float(), g.float(), b
    module, counts = fused(lambda h, g, b: router(llama(h, g).to(b.dtype), b), *given)
    assert counts == NONE
    assert reasons(module)["norm"] == ["its norm changes the dtype, and the fused router yields the dtype it reads"]
    assert module(h.float(), g.float(), b).dtype == torch.bfloat16


LEFT = {
    # an explicit rounding
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
    read = "its norm has other readers, for which it is computed anyway"
    (reason,) = reasons(module)["norm"]
    assert reason == (read if name == "another reader" else "what it reads is no root-mean-square norm of a tensor with one gain")
