"""Open the fused attention and encoder-layer operators of torch.nn, so that their linears can be seen.

    out, _ = F.multi_head_attention_forward(x, x, x, E, H, w_qkv, b_qkv, ..., w_o, b_o, ...)
    y = torch._transformer_encoder_layer_fwd(x, E, H, w_qkv, b_qkv, w_o, b_o, gelu, norm_first, eps, ...)
  become
    qkv = linear(x, w_qkv, b_qkv); q, k, v = chunk(qkv, 3); a = scaled_dot_product_attention(q, k, v); out = linear(a, w_o, b_o)

In: a Dynamo graph, changed in place. Out: how many operators were opened, and why others were not. Keys and values of
another tensor get their part of w_qkv. What cannot be opened exactly (returned attention weights, bias_k, dropout)
stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.einsums import SPELLINGS, as_linear
from rana_fx.graph.graph_pass import Declined, PassResult
from rana_fx.graph.ops import is_call, op_name
from rana_fx.graph.record import Recorder

_MHA = "multi_head_attention_forward"
_LAYER = "_transformer_encoder_layer_fwd"
_MHA_NAMES = [
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights",
    "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v",
    "average_attn_weights", "is_causal",
]  # fmt: skip
_LAYER_NAMES = [
    "src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first", "eps",
    "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "ffn1_weight", "ffn1_bias", "ffn2_weight", "ffn2_bias",
    "mask", "mask_type",
]  # fmt: skip


def unfuse(graph_module: fx.GraphModule, weights: Mapping[fx.Node, nn.Parameter]) -> PassResult:
    """Open every operator that can be opened exactly. ``weights``: the graph's Parameters."""
    opened, declined = 0, []
    for node in list(graph_module.graph.nodes):
        if not is_call(node):
            continue
        name = op_name(node)
        if name in SPELLINGS:
            found = as_linear(node, weights)
            if found is None and name != "einsum":
                continue
            reason = None if found is not None else "it is no linear"
            if found is not None:
                _splice(node, found[0], found[1], item=False)
        elif name.endswith(_MHA):
            reason = _open_attention(node)
        elif name.endswith(_LAYER.strip("_")):
            reason = _open_layer(node)
        else:
            continue
        opened += reason is None
        if reason is not None:
            declined.append(Declined(node.name, reason))
    if opened:
        graph_module.graph.lint()
        graph_module.recompile()
    return PassResult(opened, tuple(declined))


def _named(node: fx.Node, names: list[str]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _why_closed(node: fx.Node, given: Mapping[str, Any]) -> str | None:
    """Why a fused attention cannot be opened exactly, or None."""
    rank, separate = _rank(given["query"]), bool(given.get("use_separate_proj_weight"))
    reasons = {
        "its attention weights are read": any(
            op_name(user) != "getitem" or (user.args[1] == 1 and user.users) for user in node.users
        ),
        "it appends to keys or values": given.get("bias_k") is not None or bool(given.get("add_zero_attn")),
        "its keys or values are given": given.get("static_k") is not None or given.get("static_v") is not None,
        "it drops attention weights": bool(given.get("training", True)) and given.get("dropout_p", 0) != 0,
        "its query has neither 2 nor 3 dimensions": rank not in (2, 3),
        "it has no weight for query, key and value": given["in_proj_weight"] is None and not separate,
        "it masks keys of an input without a batch": rank == 2 and _dtype_flag(given.get("key_padding_mask")) is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _open_attention(node: fx.Node) -> str | None:
    """Opens it, or returns why not."""
    given = _named(node, _MHA_NAMES)
    closed = _why_closed(node, given)
    if closed is not None:
        return closed
    separate = bool(given.get("use_separate_proj_weight"))
    rank = _rank(given["query"])
    same = given["query"] is given["key"] is given["value"]
    mask = _dtype_flag(given.get("attn_mask"))
    padding = _dtype_flag(given.get("key_padding_mask"))

    def build(q: Any, k: Any, v: Any, weights: Any, bias: Any, out_weight: Any, out_bias: Any, attn: Any, keys: Any) -> Any:
        bias_sum = _mask(attn, mask, None if attn is None else _rank(given["attn_mask"]) == 3, q, given["num_heads"])
        if keys is not None:
            row = _additive(keys, bool(padding), q)[:, None, None, :]
            bias_sum = row if bias_sum is None else bias_sum + row
        # (tokens, batch, embed): heads to the front
        order, back = ((1, 2, 0, 3), (2, 0, 1, 3)) if rank == 3 else ((1, 0, 2), (1, 0, 2))
        if same and not separate:
            projected: Any = F.linear(q, weights[0], bias).chunk(3, -1)
        else:
            width = given["embed_dim_to_check"]
            parts = weights if separate else [weights[0].narrow(0, i * width, width) for i in range(3)]
            offsets = [None if bias is None else bias.narrow(0, i * width, width) for i in range(3)]
            projected = [F.linear(x, w, b) for x, w, b in zip((q, k, v), parts, offsets, strict=True)]
        return _attend(projected, out_weight, out_bias, given["num_heads"], bias_sum, order, back)

    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight") if separate else ("in_proj_weight",)
    _splice(
        node,
        build,
        [given["query"], given["key"], given["value"], [given[name] for name in names]]
        + [given[k] for k in ("in_proj_bias", "out_proj_weight", "out_proj_bias")]
        + [given.get("attn_mask"), given.get("key_padding_mask")],
        item=True,
    )
    return None


def _open_layer(node: fx.Node) -> str | None:
    """Opens it, or returns why not."""
    given = _named(node, _LAYER_NAMES)
    mask, kind = given.get("mask"), given.get("mask_type")
    if _rank(given["src"]) != 3:
        return "its input has not 3 dimensions"
    if mask is not None and kind not in (0, 1):
        return f"its mask is of type {kind}"
    boolean = _dtype_flag(mask)

    def build(x: Any, m: Any, *weights: Any) -> Any:
        w = dict(zip(_LAYER_NAMES[3:7] + _LAYER_NAMES[10:18], weights, strict=True))
        width, eps, first = given["embed_dim"], given["eps"], given["norm_first"]
        bias = None
        if m is not None:
            bias = _additive(m, bool(boolean), x)
            bias = bias[:, None, None, :] if kind == 1 else bias

        def attend(h: Any) -> Any:
            qkv = F.linear(h, w["qkv_weight"], w["qkv_bias"]).chunk(3, -1)
            return _attend(qkv, w["proj_weight"], w["proj_bias"], given["num_heads"], bias, (0, 2, 1, 3), (0, 2, 1, 3))

        def feed(h: Any) -> Any:
            inner = F.linear(h, w["ffn1_weight"], w["ffn1_bias"])
            inner = F.gelu(inner) if given["use_gelu"] else F.relu(inner)
            return F.linear(inner, w["ffn2_weight"], w["ffn2_bias"])

        def norm(h: Any, which: str) -> Any:
            return F.layer_norm(h, (width,), w[f"{which}_weight"], w[f"{which}_bias"], eps)

        if first:
            x = x + attend(norm(x, "norm1"))
            return x + feed(norm(x, "norm2"))
        x = norm(x + attend(x), "norm1")
        return norm(x + feed(x), "norm2")

    _splice(node, build, [given["src"], mask, *(given[k] for k in _LAYER_NAMES[3:7] + _LAYER_NAMES[10:18])], item=False)
    return None


def _attend(qkv: Any, wo: Any, bo: Any, heads: int, mask: Any, order: tuple[int, ...], back: tuple[int, ...]) -> Any:
    q, k, v = (qkv[i].unflatten(-1, (heads, -1)).permute(*order) for i in range(3))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.linear(attended.permute(*back).flatten(-2), wo, bo)


def _mask(attn: Any, boolean: bool | None, per_head: bool | None, like: Any, heads: int) -> Any:
    if attn is None:
        return None
    additive = _additive(attn, bool(boolean), like)
    return additive.unflatten(0, (-1, heads)) if per_head else additive


def _additive(mask: Any, boolean: bool, like: Any) -> Any:
    """A boolean mask (True: may not be attended to) as numbers to add to the scores."""
    return like.new_zeros(()).masked_fill(mask, float("-inf")) if boolean else mask


def _rank(node: object) -> int | None:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def _dtype_flag(node: object) -> bool | None:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value.dtype == torch.bool if isinstance(value, Tensor) else None


def _splice(node: fx.Node, build: Callable[..., Any], inputs: list[Any], *, item: bool) -> None:
    """Record ``build`` in the place of ``node``. ``item``: of the tuple that ``node`` yields, in the place of the first."""
    result = Recorder(node)(build, *inputs)
    if item:
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(result)
            node.graph.erase_node(user)
    else:
        node.replace_all_uses_with(result)
    node.graph.erase_node(node)
