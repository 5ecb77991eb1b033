"""Attention in graphs: calls that are replaced, calls that are left and why, heads that are read unrepeated, whole models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch._inductor.utils import run_and_get_code
from transformers import StaticCache

from bench.speed.dense import attention_alone
from rana_fx.kernels.attention import decode_attention
from rana_fx.passes.base import PostGrad, PreGrad
from rana_fx.passes.fuse_repeated_heads import fuse_repeated_heads
from rana_fx.passes.match import match_plan
from rana_fx.passes.rewrite_attention import rewrite_attention
from rana_fx.passes.runner import Runner
from tests.support.graphs import ops_of, traced
from tests.support.inductor import FALLBACK

MARKER = "// rana_decode_attention"
B, H, G, T, S, D = 1, 4, 2, 3, 24, 8


def operands(heads=G, dtype=torch.float32):
    q, k, v = torch.randn(B, T, H, D).transpose(1, 2), torch.randn(B, heads, S, D), torch.randn(B, heads, S, D)
    return [x.to(dtype) for x in (q, k, v)]


def rewritten(function, *inputs, grad=False, dynamic=False):
    """(result, graph, what the pass did) of a function whose Dynamo graph is rewritten and run eagerly."""
    made = []

    def backend(module, given):
        runner = Runner()
        runner.run((rewrite_attention,), module, PreGrad(given, match_plan(module, given)))
        made.append((module, runner.records[0].result))
        return module.forward

    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        y = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    ((module, result),) = made
    return y, module, result


def repeated(x):
    return x[:, :, None].expand(B, G, H // G, S, D).reshape(B, H, S, D)


REPLACED = {
    "mask": lambda q, k, v, m: F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=m),
    "no mask, by position": lambda q, k, v, m: F.scaled_dot_product_attention(q, repeated(k), repeated(v), None, 0.0, False),
    "gqa": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.5, enable_gqa=True),
    "added": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, torch.where(m, 0.3, -torch.inf), enable_gqa=True),
    "scaled": lambda q, k, v, m: F.scaled_dot_product_attention(q, repeated(k), repeated(v), m, scale=2),
}


@pytest.mark.parametrize("name", REPLACED)
def test_calls_are_replaced(name):
    q, k, v = operands()
    mask = torch.rand(1, 1, T, S) < 0.5
    y, module, result = rewritten(REPLACED[name], q, k, v, mask)
    assert (result.count, result.declined) == (1, ())
    assert ops_of(module) == ["decode_attention"]
    expected = REPLACED[name](q, k, v, mask)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()


@pytest.mark.parametrize("memory", ["by tokens", "contiguous"])
def test_a_result_keeps_its_memory_layout(memory):
    """PyTorch's attention returns either, by the kernel that computes it."""
    q, k, v = operands(H)
    if memory == "contiguous":
        v = torch.randn(B, H, S, D + 2)  # not in the flash kernel
    y, _, result = rewritten(F.scaled_dot_product_attention, q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v)
    assert result.count == 1
    assert expected.is_contiguous() == (memory == "contiguous")
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


def many(tokens):
    return lambda q, k, v: F.scaled_dot_product_attention(q.repeat(1, 1, tokens, 1), k, v)


LEFT = {
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), "it drops attention weights"),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal by position of its own tokens"),
    "many tokens": (many(6), "18 tokens, where kernels take 1 to 16"),
    "wide": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v.repeat(1, 1, 1, 40)), "more than 256 channels in a head"),
    "fp64": (lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()), "computes it in torch.float64"),
    "without a batch": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), "do not have the shapes"),
    "one batch for many": (lambda q, k, v: F.scaled_dot_product_attention(q.repeat(2, 1, 1, 1), k, v), "do not have the shapes"),
    "transformed": (
        lambda q, k, v: torch.vmap(F.scaled_dot_product_attention)(q[None], k[None], v[None]),
        "transform of torch.func",
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap over attention
@pytest.mark.parametrize("name", LEFT)
def test_other_calls_are_left(name):
    function, reason = LEFT[name]
    _, module, result = rewritten(function, *operands(H))
    assert result.count == 0 and ops_of(module) == []
    assert [reason in place.reason for place in result.declined] == [True]


def test_calls_under_autocast_are_left():
    def cast(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v)

    _, _, result = rewritten(cast, *operands(H))
    assert [place.reason for place in result.declined] == ["query, key, value and result differ in dtype or device"]


def test_calls_of_varying_sizes_are_left():
    _, _, result = rewritten(F.scaled_dot_product_attention, *operands(H), dynamic=True)
    assert [place.reason for place in result.declined] == ["its sizes vary"]


def test_gradients_are_kept():
    q, k, v = operands(H)
    q.requires_grad_()
    y, _, result = rewritten(F.scaled_dot_product_attention, q, k, v, grad=True)
    assert [place.reason for place in result.declined] == ["gradients flow through it"]
    y.sum().backward()
    assert q.grad is not None
    assert rewritten(F.scaled_dot_product_attention, q, k, v)[2].count == 1  # no_grad
    assert rewritten(F.scaled_dot_product_attention, q.detach(), k, v, grad=True)[2].count == 1


def heads_fused(function, *inputs):
    """(graph, what the pass did)."""
    module = traced(function, *inputs)
    runner = Runner()
    runner.run((fuse_repeated_heads,), module, PostGrad(), past_autograd=True)
    return module, runner.records[0].result


REPEATS = {
    "expand and reshape": repeated,
    "repeat_interleave": lambda x: x.repeat_interleave(H // G, 1),
    "a copy before": lambda x: repeated(x.clone()),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads_are_read_once(name):
    q, k, v = operands()
    mask = torch.rand(1, 1, T, S) < 0.5

    def attend(q, k, v, mask):
        return decode_attention(q, REPEATS[name](k), REPEATS[name](v), mask.expand(B, H, T, S), 0.5)

    module, result = heads_fused(attend, q, k, v, mask)
    assert (result.count, result.declined) == (1, ())
    (node,) = module.graph.find_nodes(op="call_function", target=decode_attention)
    assert all(tuple(item.meta["val"].shape) == (B, G, S, D) for item in node.args[1:3])
    assert tuple(node.args[3].meta["val"].shape) == (1, 1, T, S)
    assert not [n for n in module.graph.nodes if "expand" in str(n.target)]
    torch.testing.assert_close(module(q, k, v, mask), attend(q, k, v, mask))


def test_one_head_for_all():
    q, k, v = operands(1)
    module, result = heads_fused(lambda q, k, v: decode_attention(q, k.expand(B, H, S, D), v.expand(B, H, S, D)), q, k, v)
    assert result.count == 1
    (node,) = module.graph.find_nodes(op="call_function", target=decode_attention)
    assert [item.op for item in node.args[:3]] == ["placeholder"] * 3


KEPT = {
    "not repeated": (lambda q, k, v: decode_attention(q, k, v), "not repeated"),
    "values alone": (lambda q, k, v: decode_attention(q, k.repeat(1, 2, 1, 1), repeated(v)), "repeated differently"),
    "all heads in turn": (lambda q, k, v: decode_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), "not repeated"),
    "positions": (
        lambda q, k, v: decode_attention(q, *(x[:, :, :, None].expand(B, G, S, 2, D).reshape(B, H, S, D) for x in (k, v))),
        "not repeated",
    ),
    "as many positions as repeats": (
        lambda q, k, v: decode_attention(q, *(x[:, :, :2, None].expand(B, G, 2, 2, D).reshape(B, H, 2, D) for x in (k, v))),
        "not repeated",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_operands_are_read_as_they_are(name):
    function, reason = KEPT[name]
    q, k, v = operands()
    module, result = heads_fused(function, q, k, v)
    assert result.count == 0
    assert [reason in place.reason for place in result.declined] == [True]
    torch.testing.assert_close(module(q, k, v), function(q, k, v))


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
MODELS = {
    "Llama": SIZES | {"num_key_value_heads": 2},
    "GPTNeoX": SIZES,
    "Mistral": SIZES | {"num_key_value_heads": 1, "sliding_window": 16},
}


@pytest.mark.parametrize("name", MODELS)
def test_models_with_a_static_cache(name):
    """Steps after a prompt: every step reads what it and the steps before it wrote."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name], max_position_embeddings=64, attn_implementation="sdpa")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()

    def steps(forward):
        tokens = torch.arange(20)[None] % 50
        cache = StaticCache(config=config, max_cache_len=40)
        with torch.no_grad():
            model(input_ids=tokens[:, :14], past_key_values=cache, use_cache=True)
            for at in range(14, 20):
                given = {"input_ids": tokens[:, at : at + 1].clone(), "position_ids": torch.tensor([[at]])}
                yield forward(**given, past_key_values=cache, use_cache=True).logits

    expected = torch.cat(list(steps(model.forward)))
    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend=attention_alone, dynamic=False, fullgraph=True)
    got, (code, *_) = run_and_get_code(lambda: torch.cat(list(steps(compiled))))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert code.count(MARKER) >= 1 and FALLBACK not in code
    assert "_scaled_dot_product" not in code and not repeats_of_a_cache(code)
    torch.compiler.reset()
    again = torch.cat(list(steps(torch.compile(model.forward, backend=attention_alone, dynamic=False, fullgraph=True))))
    assert torch.equal(got, again)


def repeats_of_a_cache(code):
    """Whether a buffer has the size of a cache whose heads are repeated."""
    return "empty_strided_cpu((1, 4, 40, 8)" in code or "(1, 2, 2, 40, 8)" in code
