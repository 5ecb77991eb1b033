"""Replace attention of a few tokens by ``rana::decode_attention``, which repeats no heads and skips masked positions.

    y = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=s)
  becomes
    y = rana.decode_attention(q, k, v, mask, s)

In: a Dynamo graph. Out: how many calls were replaced, and why others were not. A result keeps its memory layout: where it is
contiguous and the operation's is not, it is copied. Repeated heads are found past autograd (fuse_repeated_heads.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from rana_fx.graph.dataflow import descendants, shape_of, value_of
from rana_fx.graph.ops import is_call, op_name
from rana_fx.graph.transforms import transformed
from rana_fx.kernels.attention import decode_attention, why_not_compiled
from rana_fx.passes.base import Declined, PassResult, PreGrad
from rana_fx.passes.emit import Emitter

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def rewrite_attention(graph_module: fx.GraphModule, context: PreGrad) -> PassResult:  # noqa: ARG001
    """Counts the calls of ``scaled_dot_product_attention`` that were replaced."""
    graph = graph_module.graph
    calls = [node for node in graph.nodes if is_call(node) and op_name(node) == "scaled_dot_product_attention"]
    left: dict[fx.Node, str] = {}
    if calls:
        left |= dict.fromkeys(transformed(graph), "it is inside a transform of torch.func")
        left |= dict.fromkeys(_differentiated(graph), "gradients flow through it")
    declined = []
    for node in calls:
        given = _DEFAULTS | dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
        reason = left.get(node) or next(_reasons(node, given), None) or _replace(graph_module, node, given)
        if reason is not None:
            declined.append(Declined(node.name, reason))
    return PassResult(len(calls) - len(declined), tuple(declined))


def _differentiated(graph: fx.Graph) -> set[fx.Node]:
    """What is computed from anything that requires gradients: also from factors that an earlier pass put into the graph."""
    if not torch.is_grad_enabled():
        return set()
    leaves = (node for node in graph.nodes if node.op in ("placeholder", "get_attr"))
    return descendants(node for node in leaves if getattr(value_of(node), "requires_grad", False))


def _reasons(node: fx.Node, given: dict[str, Any]) -> Iterator[str]:
    """The reasons why a call is not replaced."""
    mask = given["attn_mask"]
    nodes = [node, *(given.get(name) for name in _NAMES[:3]), *([] if mask is None else [mask])]
    values = [value_of(item) if isinstance(item, fx.Node) else None for item in nodes]
    if not all(isinstance(value, Tensor) for value in values):
        yield "what it reads has no fake value"
        return
    tensors: list[Any] = values
    if not all(isinstance(size, int) for tensor in tensors for size in (*tensor.shape, *tensor.stride())):
        yield "its sizes vary"
        return
    y, q, k, v = tensors[:4]
    if given["dropout_p"] != 0:
        yield "it drops attention weights"
    if given["is_causal"]:
        yield "it is causal by position of its own tokens"
    if not isinstance(given["scale"], (int, float, type(None))):
        yield "its scale is computed"
    if len({tensor.dtype for tensor in (y, q, k, v)}) != 1 or len({tensor.device for tensor in tensors}) != 1:
        yield "query, key, value and result differ in dtype or device"
    if not all(tensor.dim() == 4 for tensor in (y, q, k, v)) or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        yield "its operands do not have the shapes (B, H, T, D), (B, G, S, D), (B, G, S, E)"
        return
    if q.shape[1] != k.shape[1] and not (given["enable_gqa"] and k.shape[1] and q.shape[1] % k.shape[1] == 0):
        yield "its operands do not have the same number of heads"
    if 0 in (*q.shape, *k.shape):
        yield "it is empty"
    reason = why_not_compiled(q.device, q.dtype, q.shape[2], (q.shape[3], v.shape[3]))
    if reason is not None:
        yield reason


def _replace(graph_module: fx.GraphModule, node: fx.Node, given: dict[str, Any]) -> str | None:
    """Replace a call, or return the reason why not."""
    q, mask = given["query"], given["attn_mask"]
    y: Any = value_of(node)
    channels: Any = shape_of(q)
    scale = channels[-1] ** -0.5 if given["scale"] is None else float(given["scale"])
    emit = Emitter(graph_module, node)
    new = emit.call(decode_attention, q, given["key"], given["value"], mask, scale)
    if not _same_layout(y, value_of(new)):
        if not y.is_contiguous():
            graph_module.graph.erase_node(new)
            return "its result has another memory layout"
        new = emit.call(torch.clone, new, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
    return None


def _same_layout(one: Tensor, other: Any) -> bool:
    """Whether strides are equal where a size is not 1."""
    return all(size == 1 or a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True))
