"""Attention reads the heads of a cache themselves, not a copy of them for each query head.

    c = clone(expand(unsqueeze(k, 2), (B, G, R, S, D))); y = decode_attention(q, view(c, (B, G R, S, D)), ..., expand(m), s)
  becomes
    y = decode_attention(q, k, ..., m, s)

In: an aten graph past autograd. Out: how many operations read fewer heads, and why others read what they did. Repetitions are
recognised by the shapes of the views between a tensor and the operation. The operation reads a mask that broadcasts as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rana_fx.graph.dataflow import shape_of, statically_equal
from rana_fx.graph.fake_values import fake_run
from rana_fx.kernels.attention import decode_attention
from rana_fx.passes.base import Declined, PassResult, PostGrad

_aten = torch.ops.aten
_COPIES = (_aten.clone, _aten.alias)
_VIEWS = (_aten.view, _aten.reshape, _aten._unsafe_view)


def fuse_repeated_heads(graph_module: fx.GraphModule, context: PostGrad) -> PassResult:  # noqa: ARG001
    """Counts the operations whose keys and values are read unrepeated."""
    count, declined = 0, []
    for node in graph_module.graph.find_nodes(op="call_function", target=decode_attention):
        q, k, v, *rest = node.args
        heads = [_unrepeated(x) for x in (k, v)]
        sizes = [_size(x, 1) for x in heads]
        if heads == [k, v]:
            declined.append(Declined(node.name, "its keys and values are not repeated"))
        elif not statically_equal(*sizes):
            declined.append(Declined(node.name, "its keys and values are repeated differently"))
            heads = [k, v]
        else:
            count += 1
        if rest and rest[0] is not None:
            rest[0] = _unexpanded(rest[0])
        node.args = (q, *heads, *rest)
        node.meta["val"] = fake_run(node)
        node.meta.pop("eager_input_vals", None)  # of the operands that it had
    return PassResult(count, tuple(declined))


def _unrepeated(x: Any) -> Any:
    """The (B, G, S, D) tensor of which x, (B, G * R, S, D), is each head R times in a row; x if there is none."""
    shape, node = shape_of(x), _source_of_copies(x)
    if shape is None or not _is(node, (*_VIEWS, _aten.expand)):
        return x
    if _is(node, (_aten.expand,)):  # one head for all
        inner = node.args[0]
        return inner if _sizes_equal(inner, (shape[0], 1, *shape[2:])) else x
    node = _source_of_copies(node.args[0])
    repeated = shape_of(node)
    if not _is(node, (_aten.expand,)) or repeated is None or len(repeated) != 5:
        return x
    groups, repeats = repeated[1:3]
    merged = statically_equal(groups * repeats, shape[1]) and _sizes_equal(node, (shape[0], groups, repeats, *shape[2:]))
    inner = node.args[0]
    if not merged or not _sizes_equal(inner, (shape[0], groups, 1, *shape[2:])):
        return x
    inner = _source_of_copies(inner)
    if _is(inner, (*_VIEWS, _aten.unsqueeze)) and _sizes_equal(inner.args[0], (shape[0], groups, *shape[2:])):
        return inner.args[0]
    return x


def _unexpanded(mask: Any) -> Any:
    """The tensor that a mask is an expansion of, with as many dimensions or fewer."""
    node = _source_of_copies(mask)
    return _unexpanded(node.args[0]) if _is(node, (_aten.expand,)) else node


def _source_of_copies(node: Any) -> Any:
    """What a copy in another layout, or an alias, has the values of."""
    while _is(node, _COPIES):
        node = node.args[0]
    return node


def _is(node: Any, packets: tuple[Any, ...]) -> bool:
    return isinstance(node, fx.Node) and getattr(node.target, "overloadpacket", None) in packets


def _size(node: Any, dim: int) -> Any:
    shape = shape_of(node)
    assert shape is not None, "every tensor past autograd has a fake value"
    return shape[dim]


def _sizes_equal(node: Any, sizes: tuple[Any, ...]) -> bool:
    shape = shape_of(node) if isinstance(node, fx.Node) else None
    return shape is not None and len(shape) == len(sizes) and all(map(statically_equal, shape, sizes))
