"""Fusion of norms into masked matmuls: what is fused, what is not and the reasons, and unchanged values."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from rana_fx.formats import pack
from rana_fx.kernels import registry
from rana_fx.kernels.ops import masked_gemv, masked_gemv_normed, router
from rana_fx.kernels.problem import Problem
from rana_fx.passes import fusible, lower
from tests.passes.test_fuse_norm import EPS, NORMS, WIDTH, llama
from tests.support.graphs import NONE, Fusing, fused, mask, ops_of, reasons, traced
from tests.support.products import DTYPES, assert_close

OUT = 32


def operands(dtype, lead=(1, 2)):
    h, g = torch.randn(*lead, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    return h, g, mask(WIDTH), (torch.randn(WIDTH, OUT) / WIDTH**0.5).to(dtype), torch.randn(OUT).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
def test_norm_is_taken_into_its_product(name, dtype):
    h, g, tau, w, c = operands(dtype)
    module, counts = fused(lambda h, g, *rest: masked_gemv(NORMS[name](h, g), *rest), h, g, tau, w, c)
    assert counts == NONE | {"product_norm": 1}
    assert ops_of(module) == ["masked_gemv_normed"]
    # h or g cast is no cast where all is fp32 already
    assert sum(node.op == "call_function" for node in module.graph.nodes) == 1
    x = h.double() / (h.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    x = torch.where(tau == 0, x * {"gemma": 1 + g.double(), "without_gain": 1.0}.get(name, g.double()), 0)
    # the input is rounded, and the error of the norm's sum has the same bound as that of the matmul
    magnitude = (2 + 2**0.5) * x.abs() @ w.double().abs() + c.double().abs()
    assert_close("y", module(h, g, tau, w, c), x @ w.double() + c.double(), magnitude, terms=WIDTH)


def test_a_gate_behind_the_product_stays():
    """In 4 bits, with a bias; the density stays, too."""
    h, g, tau, _, _ = operands(torch.float32, lead=(1,))
    weight, scale = pack(torch.randn(WIDTH, 256), 4)

    def gated(h, g, tau, weight, scale, c):
        y = masked_gemv(llama(h, g), tau, weight, c, scale, density=0.25)
        return silu(y[..., :128]) * y[..., 128:]

    inputs = h, g, tau, weight, scale, torch.randn(256)
    module, counts = fused(gated, *inputs)
    assert counts == NONE | {"gated": 1, "product_norm": 1}
    assert ops_of(module) == ["masked_gemv_normed"]
    (node,) = module.graph.find_nodes(op="call_function", target=masked_gemv_normed)
    assert node.args[6:8] == (0.25, "silu")
    torch.testing.assert_close(module(*inputs), gated(*inputs))


def test_every_product_of_a_norm_takes_it():
    """Packed weights share no launch."""
    h, g, tau, _, _ = operands(torch.bfloat16)
    one, other = (pack(torch.randn(WIDTH, 64, generator=torch.Generator().manual_seed(i)), 4) for i in (0, 1))

    def two(h, g, tau, *weights):
        x = llama(h, g)
        return masked_gemv(x, tau, weights[0], None, weights[1]), masked_gemv(x, tau, weights[2], None, weights[3])

    module, counts = fused(two, h, g, tau, *one, *other)
    assert counts == NONE | {"product_norm": 2}
    assert ops_of(module) == ["masked_gemv_normed"] * 2


def test_a_shared_launch_goes_first():
    h, g, tau, w, _ = operands(torch.bfloat16)
    other = w[:, :16].contiguous()
    module, counts = fused(
        lambda h, g, t, w, other: (masked_gemv(x := llama(h, g), t, w), masked_gemv(x, t, other)), h, g, tau, w, other
    )
    assert counts == NONE | {"same_input": 1}
    assert ops_of(module) == ["masked_gemv_parts"]


NO_NORM = "what it reads is no root-mean-square norm of a tensor with one gain"
READ = "its norm has other readers, for which it is computed anyway"
LEFT = {
    "another reader": (lambda h, g, t, w: (masked_gemv(x := llama(h, g), t, w), x + 1), READ),
    "a router": (lambda h, g, t, w: (masked_gemv(x := llama(h, g), t, w), router(x, w.t())), READ),
    "no norm": (lambda h, g, t, w: masked_gemv(h * g, t, w), NO_NORM),
    "another dtype": (
        lambda h, g, t, w: masked_gemv(llama(h.float(), g).half(), t, w),
        "its norm changes the dtype, and the fused matmul yields the dtype it reads",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name):
    function, reason = LEFT[name]
    inputs = operands(torch.float32)[:4]
    module, counts = fused(function, *inputs)
    assert counts == NONE
    assert reasons(module)["product_norm"] == [reason]


def test_a_norm_that_no_kernel_takes_is_left(monkeypatch):
    """By the registry's choice for the call, from which the reason is."""
    inputs = operands(torch.float32)[:4]
    asked = []

    def on_a_gpu(op, arguments, operand_of, *, compiled):
        asked.append((op, compiled, arguments["density"]))
        return Problem(op, torch.device("cuda"), torch.float32, 2, 2, WIDTH, OUT, torch.float32, 32)

    monkeypatch.setattr(fusible, "problem_of", on_a_gpu)
    module, counts = fused(lambda h, g, t, w: masked_gemv(llama(h, g), t, w, density=0.25), *inputs)
    assert counts == NONE and asked[0] == ("masked_gemv_normed", True, 0.25)
    (reason,) = reasons(module)["product_norm"]
    assert reason.startswith("tensor_cores: multiplies bfloat16 and float16")
    # with a kernel for it
    row = registry.Implementation("masked_gemv_normed", "mine", "cuda", lower=lambda *_: None)
    unregister = registry.register_implementation(row)
    try:
        assert fused(lambda h, g, t, w: masked_gemv(llama(h, g), t, w), *inputs)[1] == NONE | {"product_norm": 1}
    finally:
        unregister()


@pytest.mark.parametrize("layers", [1, 3])
def test_counts_follow_the_depth(layers):
    inputs = torch.randn(1, WIDTH), torch.randn(WIDTH), mask(WIDTH), torch.randn(WIDTH, WIDTH) / WIDTH**0.5

    def run(r, g, tau, w):
        for _ in range(layers):
            r = masked_gemv(llama(r, g), tau, w) * 2
        return r

    module, counts = fused(run, *inputs)
    assert counts == NONE | {"product_norm": layers}
    assert ops_of(module) == ["masked_gemv_normed"] * layers
    torch.testing.assert_close(module(*inputs), run(*inputs), rtol=1e-4, atol=1e-4)


def test_inductor_lowers_it():
    fusing, inputs = Fusing(), operands(torch.float32)
    lower.register()

    def step(h, g, tau, w, c):
        return masked_gemv(llama(h, g), tau, w, c)

    with torch.no_grad():
        got = torch.compile(step, options={"post_grad_custom_pre_pass": fusing})(*inputs)
    assert fusing.counted == [NONE | {"product_norm": 1}]
    torch.testing.assert_close(got, step(*inputs), rtol=1e-5, atol=1e-5)


def test_sizes_that_vary_are_left():
    h, g, tau, w, _ = operands(torch.float32)
    module = traced(lambda h, g, t, w: masked_gemv(llama(h, g), t, w), h, g, tau, w)
    (node,) = module.graph.find_nodes(op="call_function", target=masked_gemv)
    value = node.args[2].meta["val"]
    symbol = torch.fx.experimental.symbolic_shapes.ShapeEnv().create_unbacked_symint()
    node.args[2].meta["val"] = value.new_empty_strided((WIDTH, OUT), (OUT, 1)).as_strided((WIDTH, OUT), (symbol, 1))
    args = (node.args[0], None, *node.args[1:3], None, None, 0.5, None, EPS, 0.0)
    assert fusible.why_not_launched(masked_gemv_normed, args) == "sizes vary"
