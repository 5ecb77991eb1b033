"""Matmuls of one tensor in one launch: which are combined, which are not, and unchanged values."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from rana_fx.formats import pack
from rana_fx.kernels.ops import masked_gemv, masked_gemv_parts
from rana_fx.passes import lower
from tests.support.graphs import NONE, Fusing, fused, mask, ops_of, reasons
from tests.support.products import DTYPES, assert_close

K, SIZES = 48, (32, 16, 16)


def weights(dtype=torch.float32, sizes=SIZES):
    """(out, in), column-major, as a plan stores weights of neuron adapters."""
    return [(torch.randn(K, size) / K**0.5).to(dtype).t() for size in sizes]


def attention(x, masks, parts, biases):
    q, k, v = (
        masked_gemv(x, tau, w.t(), bias, density=0.25 * (1 + i))
        for i, (tau, w, bias) in enumerate(zip(masks, parts, biases, strict=True))
    )
    return q.view(*q.shape[:-1], 2, 16).sum(-2) * k.sigmoid() * v


def operands(dtype, bias, tokens=1):
    masks = [mask(K), mask(K).flip(0).contiguous(), torch.zeros(K)]
    biases = [torch.randn(size).to(dtype) if bias else None for size in SIZES]
    return torch.randn(1, tokens, K).to(dtype), masks, weights(dtype), biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_three_masks_of_one_tensor(dtype, bias, tokens):
    inputs = operands(dtype, bias, tokens)
    module, counts = fused(attention, *inputs)
    assert counts == NONE | {"same_input": 1}
    assert ops_of(module) == ["masked_gemv_parts"]
    node = next(node for node in module.graph.nodes if node.target is masked_gemv_parts)
    assert [len(part) for part in node.args[1:4]] == [3, 3, 3 if bias else 0]
    # by outputs: (0.25 * 32 + 0.5 * 16 + 0.75 * 16) / 64
    assert node.args[4] == pytest.approx(0.4375)
    torch.testing.assert_close(module(*inputs), attention(*inputs))


def test_values_of_the_parts():
    x, masks, parts, biases = operands(torch.bfloat16, True)
    module, _ = fused(
        lambda x, *rest: [masked_gemv(x, *one) for one in zip(*rest, strict=True)], x, masks, [w.t() for w in parts], biases
    )
    for got, tau, w, bias in zip(module(x, masks, [w.t() for w in parts], biases), masks, parts, biases, strict=True):
        kept = torch.where(tau == 0, x.double(), 0)
        magnitude = kept.abs() @ w.t().double().abs() + bias.double().abs()
        assert_close("y", got, kept @ w.t().double() + bias.double(), magnitude, terms=K + 1)


ALONE = "no other masked matmul of the same tensor has the same dtype and a bias likewise"
APART = {
    "two tensors": (lambda x, t, a, b: (masked_gemv(x, t, a), masked_gemv(x * 2, t, b)), [ALONE] * 2),
    "one alone": (lambda x, t, a, b: masked_gemv(x, t, a) * 2, [ALONE]),  # noqa: ARG005
    "a bias here and none there": (lambda x, t, a, b: (masked_gemv(x, t, a, t[:32]), masked_gemv(x, t, b)), [ALONE] * 2),
    "a mask computed from the other": (
        lambda x, t, a, b: (y := masked_gemv(x, t, a), masked_gemv(x, t + y.mean(), b)),
        ["one of its operands is computed after masked_gemv", ALONE],
    ),
    "rows that are no stretch": (
        lambda x, t, a, b: (masked_gemv(x, t, a.t().contiguous().t()), masked_gemv(x, t, b)),
        ["the rows of its weight are not contiguous", ALONE],
    ),
    "two dtypes": (lambda x, t, a, b: (masked_gemv(x, t, a), masked_gemv(x, t, b.bfloat16()).float()), [ALONE] * 2),
    "one into a sum": (lambda x, t, a, b: (masked_gemv(x, t, a), masked_gemv(x, t, b) + x[..., :16]), [ALONE]),
    "thresholds that are no stretch": (
        lambda x, t, a, b: (masked_gemv(x, t, a), masked_gemv(x, t.repeat(2)[::2], b)),
        ["its thresholds or its bias are not contiguous", ALONE],
    ),
}


@pytest.mark.parametrize("name", APART)
def test_others_are_left_apart(name):
    inputs = torch.randn(1, K), mask(K), torch.randn(K, 32), torch.randn(K, 16)
    function, expected = APART[name]
    module, counts = fused(function, *inputs)
    assert counts["same_input"] == 0
    assert "masked_gemv_parts" not in ops_of(module)
    assert reasons(module)["same_input"] == expected


def test_few_bits_are_left_apart():
    x, tau, (weight, scale) = torch.randn(1, K), mask(K), pack(torch.randn(K, 32), 8)
    module, counts = fused(lambda *given: (masked_gemv(*given), masked_gemv(*given)), x, tau, weight, None, scale)
    assert counts == NONE
    assert reasons(module)["same_input"] == ["its weight is in 8 or 4 bits"] * 2


def test_five_of_one_tensor_are_two_launches():
    x, many = torch.randn(1, K), [torch.randn(K, 16) for _ in range(5)]
    module, counts = fused(lambda x, tau, many: [masked_gemv(x, tau, w) for w in many], x, mask(K), many)
    assert counts == NONE | {"same_input": 2}
    sizes = [len(node.args[1]) for node in module.graph.nodes if node.target is masked_gemv_parts]
    assert sizes == [3, 2]


def model(layers):
    """(function, inputs): layers of q, k, v and of gate and up with different masks, followed by further matmuls."""

    def parameters():
        widths = (*SIZES, 24, 24)
        return (
            [mask(K) for _ in widths],
            weights(sizes=widths),
            mask(16),
            torch.randn(16, K) / 4,
            mask(24),
            torch.randn(24, K) / 5,
        )

    def run(x, *layers):
        for masks, parts, tau_o, w_o, tau_d, w_d in layers:
            x = x + masked_gemv(attention(x, masks[:3], parts[:3], [None] * 3), tau_o, w_o)
            gate, up = (masked_gemv(x, tau, w.t()) for tau, w in zip(masks[3:], parts[3:], strict=True))
            x = x + masked_gemv(silu(gate) * up, tau_d, w_d)
        return x

    return run, (torch.randn(1, 1, K), *(parameters() for _ in range(layers)))


@pytest.mark.parametrize("layers", [1, 3])
def test_counts_follow_the_depth(layers):
    run, inputs = model(layers)
    module, counts = fused(run, *inputs)
    assert counts == NONE | {"same_input": 2 * layers, "residual": 2 * layers}
    assert ops_of(module) == ["masked_gemv_parts", "masked_gemv_add"] * 2 * layers
    torch.testing.assert_close(module(*inputs), run(*inputs), rtol=1e-4, atol=1e-4)


def test_inductor_lowers_it():
    fusing = Fusing()
    lower.register()
    run, inputs = model(2)
    with torch.no_grad(), torch._inductor.config.patch(post_grad_custom_pre_pass=fusing):
        got = torch.compile(run)(*inputs)
    assert [counts["same_input"] for counts in fusing.counted] == [4]
    torch.testing.assert_close(got, run(*inputs), rtol=1e-4, atol=1e-4)
