"""Fuse the root-mean-square norm in front of a router into the router's launch.

    x = g * (h * rsqrt(mean(h^2, -1) + eps)); z = rana.router(x, B)
  becomes
    z = rana.normed_router(h, g, B, None, eps, 0.0)

In: an aten graph past autograd (Inductor's post-grad graph), few tokens on a GPU. Out: the same graph, rewritten in place.

This saves a launch per layer, which takes as long as reading megabytes, and the router can then read its weight while the matmul
before it is still running. The norm is recognised by dataflow: a product of one tensor, the reciprocal root of the mean of its
own square, and vectors. The factors of a product commute, so their grouping in the model does not matter; the result is rounded
once instead of at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from rana_fx.graph.dataflow import shape_of
from rana_fx.graph.ops import ATEN_SUMS, ATEN_VIEWS
from rana_fx.kernels.ops import normed_router, router
from rana_fx.passes.base import PassResult, PostGrad
from rana_fx.passes.fuse_gated import ROUNDINGS
from rana_fx.passes.fusible import fuse_each, put, replace

_aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class Norm:
    """x = h / sqrt(mean h^2 + eps) * (gain + offset)."""

    h: fx.Node
    gain: fx.Node | None
    eps: float
    offset: float


def fuse_norm(graph_module: fx.GraphModule, context: PostGrad) -> PassResult:
    """Fuse every router that reads a norm which only routers read."""
    return fuse_each(graph_module, router, "normed_router", context, _fuse)


def _fuse(node: fx.Node) -> str | None:
    """Fuses the norm, or returns the reason why not."""
    x, weight, scale = (*node.args, None)[:3]
    assert isinstance(x, fx.Node)
    norm = norm_of(x)
    if norm is None:
        return "what it reads is no root-mean-square norm of a tensor with one gain"
    if any(user.target is not router for user in x.users):
        return "its norm has other readers, for which it is computed anyway"
    if norm.h.meta["val"].dtype != x.meta["val"].dtype:
        return "its norm changes the dtype, and the fused router yields the dtype it reads"
    fused = put(node, normed_router, (norm.h, norm.gain, weight, scale, norm.eps, norm.offset))
    if not replace(node, fused):
        return "the fused router has another memory layout"
    # other routers that read x are visited in later calls
    node.graph.erase_node(node)
    return None


def norm_of(x: fx.Node) -> Norm | None:
    """x as the norm of a tensor of its own shape, or None."""
    root = next((factor for factor in _factors(x) if _under_root(factor) is not None), None)
    found = None if root is None else _squared(_under_root(root))
    if root is None or found is None or shape_of(found[0]) != shape_of(x):
        return None
    h, eps = found
    # h itself may be a product, which is not to be split
    gains = list(_factors(x, h))
    if gains.count(h) != 1 or gains.count(root) != 1:
        return None
    gains = [factor for factor in gains if factor is not h and factor is not root]
    if len(gains) > 1 or not all(shape_of(gain) == (_last(x),) for gain in gains):
        return None
    gain, offset = _offset_of(gains[0]) if gains else (None, 0.0)
    return Norm(h, gain, eps, offset)


def _bare(node: fx.Node) -> fx.Node:
    """The node that a chain of casts, and of views that keep the last dimension, starts from."""
    while (node.target is _CAST and node.args[1] in ROUNDINGS) or (
        node.target in ATEN_VIEWS and _last(node) == _last(node.args[0])
    ):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def _last(node: object) -> int | None:
    shape = shape_of(node) if isinstance(node, fx.Node) else None
    return shape[-1] if shape else None


def _factors(node: fx.Node, whole: fx.Node | None = None) -> Iterator[fx.Node]:
    """The factors of a product, through casts and views; ``whole`` is not split into factors."""
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
    if not isinstance(total, fx.Node) or total.target not in ATEN_SUMS or total.kwargs:
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
    if (
        gain.target in ATEN_SUMS
        and isinstance(gain.args[0], fx.Node)
        and isinstance(gain.args[1], (int, float))
        and not gain.kwargs
    ):
        return _bare(gain.args[0]), float(gain.args[1])
    return gain, 0.0
