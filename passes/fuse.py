"""Take what surrounds the two products into their launches: the norm in front of a router, the residual or gate behind a product.

In: an aten graph past autograd (Inductor's post-grad graph), few tokens on a GPU. Out: the same graph, rewritten in place.

    x = g * (h * rsqrt(mean(h^2, -1) + eps)); z = rana.router(x, B)
  becomes
    z = rana.normed_router(h, g, B, None, eps, 0.0)

    h2 = h + rana.masked_gemv(v, tau, At, c)
  becomes
    h2 = rana.masked_gemv_add(v, tau, At, c, None, density, h)

    g, u = split(rana.masked_gemv(v, tau, At, c), n, -1); p = silu(g) * u
  becomes
    p = rana.masked_gemv_gated(v, tau, At, c, None, density, "silu")             fuse_gated.py

    products of one tensor, each under its own mask, in one launch               fuse_parts.py

Each is a launch less per layer where launches cost as much as megabytes, and the router can then read its weight while the
product before it is still running. The norm is told by dataflow, whatever the model calls it: a product of one tensor, the
reciprocal root of the mean of its own square, and vectors. The factors of a product commute, so how the model groups them does
not matter; what is computed is rounded once instead of at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rana_fx.graph.dataflow import shape_of
from rana_fx.kernels.ops import masked_gemv, masked_gemv_add, masked_gemv_gated, normed_router, router
from rana_fx.kernels.registry import tokens_fused
from rana_fx.kernels.triton.config import TOKENS_AT_ONCE
from rana_fx.passes.fuse_gated import ROUNDINGS, gated_of
from rana_fx.passes.fuse_same_input import fuse_parts, meta_of, operands

_aten = torch.ops.aten
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.expand.default, _aten.clone.default}
_SUMS = {_aten.add.Tensor, _aten.add.Scalar}
_CAST = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class Norm:
    """x = h / sqrt(mean h^2 + eps) * (gain + offset)."""

    h: fx.Node
    gain: fx.Node | None
    eps: float
    offset: float


def fuse(graph: fx.Graph, *, devices: tuple[str, ...] | None = None) -> dict[str, int]:
    """Returns how many of each were fused. devices: types to fuse on; None: those with launches of fused operations."""
    counts = {"norm": 0, "residual": 0, "gated": 0, "parts": 0}
    for node in list(graph.nodes):
        if node.target is router and _few(node.args[0], "normed_router", devices):
            counts["norm"] += _fuse_norm(graph, node)
        elif node.target is masked_gemv and _few(node.args[0], "masked_gemv_add", devices):
            if _fuse_residual(graph, node):
                counts["residual"] += 1
            else:
                counts["gated"] += _fuse_gated(graph, node)
    counts["parts"] = fuse_parts(graph, lambda node: _few(node, "masked_gemv_parts", devices))
    if any(counts.values()):
        graph.eliminate_dead_code()
        graph.lint()
    return counts


def _few(node: object, op: str, devices: tuple[str, ...] | None) -> bool:
    """Whether a node holds so few tokens, on such a device, that a launch of a fused operation takes them together."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return False
    tokens, device = math.prod(value.shape[:-1]), value.device.type
    most = tokens_fused(op, device) if devices is None else TOKENS_AT_ONCE if device in devices else 0
    return isinstance(tokens, int) and 1 <= tokens <= most


def _fuse_norm(graph: fx.Graph, node: fx.Node) -> int:
    x, weight, scale = (*node.args, None)[:3]
    assert isinstance(x, fx.Node)
    # with another reader the norm would be computed all the same
    norm = norm_of(x) if all(user.target is router for user in x.users) else None
    # the result has the dtype of what is normalised
    if norm is None or norm.h.meta["val"].dtype != x.meta["val"].dtype:
        return 0
    with graph.inserting_before(node):
        fused = graph.call_function(normed_router, (norm.h, norm.gain, weight, scale, norm.eps, norm.offset))
    fused.meta = meta_of(node)
    node.replace_all_uses_with(fused)
    # x keeps its other routers as users, which are asked one by one
    graph.erase_node(node)
    return 1


def _fuse_residual(graph: fx.Graph, node: fx.Node) -> int:
    users = list(node.users)
    if len(users) != 1 or users[0].target is not _aten.add.Tensor or users[0].kwargs.get("alpha", 1) != 1:
        return 0
    total = users[0]
    others = [arg for arg in total.args if arg is not node]
    value = node.meta.get("val")
    if len(others) != 1 or not isinstance(others[0], fx.Node) or not isinstance(value, Tensor):
        return 0
    residual = others[0].meta.get("val")
    if not isinstance(residual, Tensor) or residual.shape != value.shape or residual.dtype != value.dtype:
        return 0
    with graph.inserting_before(total):
        fused = graph.call_function(masked_gemv_add, (*operands(node).values(), others[0]))
    fused.meta = meta_of(total)
    total.replace_all_uses_with(fused)
    graph.erase_node(total)
    graph.erase_node(node)
    return 1


def _fuse_gated(graph: fx.Graph, node: fx.Node) -> int:
    found = gated_of(node)
    if found is None:
        return 0
    product, activation = found
    value, wanted = node.meta["val"], product.meta["val"]
    shape = (*value.shape[:-1], value.shape[-1] // 2)
    with graph.inserting_before(product):
        fused = graph.call_function(masked_gemv_gated, (*operands(node).values(), activation))
        made = value.new_empty(shape)
        fused.meta = meta_of(product) | {"val": made}
        result = fused
        if wanted.shape != shape:
            result = graph.call_function(_aten.reshape.default, (fused, list(wanted.shape)))
            result.meta = meta_of(product) | {"val": made.reshape(wanted.shape)}
    # what it was computed from has no other reader: fuse() removes it
    product.replace_all_uses_with(result)
    return 1


def norm_of(x: fx.Node) -> Norm | None:
    """x as the norm of a tensor of its own shape, or None."""
    root = next((factor for factor in _factors(x) if _under_root(factor) is not None), None)
    found = None if root is None else _squared(_under_root(root))
    if root is None or found is None or shape_of(found[0]) != shape_of(x):
        return None
    h, eps = found
    # h may be a product itself
    gains = list(_factors(x, h))
    if gains.count(h) != 1 or gains.count(root) != 1:
        return None
    gains = [factor for factor in gains if factor is not h and factor is not root]
    if len(gains) > 1 or not all(shape_of(gain) == (_last(x),) for gain in gains):
        return None
    gain, offset = _offset_of(gains[0]) if gains else (None, 0.0)
    return Norm(h, gain, eps, offset)


def _bare(node: fx.Node) -> fx.Node:
    """What a chain of casts, and of views that keep the last dimension, starts from."""
    while (node.target is _CAST and node.args[1] in ROUNDINGS) or (node.target in _VIEWS and _last(node) == _last(node.args[0])):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def _last(node: object) -> int | None:
    shape = shape_of(node) if isinstance(node, fx.Node) else None
    return shape[-1] if shape else None


def _factors(node: fx.Node, whole: fx.Node | None = None) -> Iterator[fx.Node]:
    """The factors of a product, casts and views seen through; ``whole`` is not taken apart."""
    node = _bare(node)
    if node is not whole and node.target is _aten.mul.Tensor and all(isinstance(arg, fx.Node) for arg in node.args):
        for arg in node.args:
            assert isinstance(arg, fx.Node)
            yield from _factors(arg, whole)
    else:
        yield node


def _under_root(node: fx.Node) -> object:
    """t, if node = 1 / sqrt(t)."""
    if node.target is _aten.rsqrt.default or (node.target is _aten.pow.Tensor_Scalar and node.args[1] == -0.5):
        return node.args[0]
    if node.target is _aten.reciprocal.default:
        root = node.args[0]
        return root.args[0] if isinstance(root, fx.Node) and root.target is _aten.sqrt.default else None
    return None


def _squared(total: object) -> tuple[fx.Node, float] | None:
    """(h, eps), if total = mean(h^2, -1, keepdim) + eps."""
    if not isinstance(total, fx.Node) or total.target not in _SUMS or total.kwargs:
        return None
    mean, eps = total.args
    if not isinstance(mean, fx.Node) or mean.target is not _aten.mean.dim or not isinstance(eps, (int, float)):
        return None
    square, dims, keep = (*mean.args, None, False)[:3]
    shape = shape_of(square) if isinstance(square, fx.Node) else None
    if not isinstance(square, fx.Node) or shape is None or dims not in ([-1], [len(shape) - 1]) or keep is not True:
        return None
    square = _bare(square)
    parts = list(square.args) if square.target is _aten.mul.Tensor else [square.args[0]] * 2
    if square.target is not _aten.mul.Tensor and (square.target is not _aten.pow.Tensor_Scalar or square.args[1] != 2):
        return None
    bare = [_bare(part) for part in parts if isinstance(part, fx.Node)]
    return (bare[0], float(eps)) if len(bare) == 2 and bare[0] is bare[1] else None


def _offset_of(gain: fx.Node) -> tuple[fx.Node, float]:
    """(g, c) of a gain that is g + c with a number c (Gemma's 1 + g), or (gain, 0)."""
    if gain.target in _SUMS and isinstance(gain.args[0], fx.Node) and isinstance(gain.args[1], (int, float)) and not gain.kwargs:
        return _bare(gain.args[0]), float(gain.args[1])
    return gain, 0.0
