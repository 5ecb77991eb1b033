"""Fuse the root-mean-square norm in front of a masked matmul into its launch.

    x = g * (h * rsqrt(mean(h^2, -1) + eps)); y = rana.masked_gemv(x, tau, At)
  becomes
    y = rana.masked_gemv_normed(h, g, tau, At, None, None, density, None, eps, 0.0)

In: an aten graph past autograd (Inductor's post-grad graph), few tokens on a GPU. Out: the same graph, rewritten in place.
Matmuls with a gate behind them (rana.masked_gemv_gated) keep it.

A norm is left where something else reads it, which needs it in memory anyway, and where no kernel is expected to compute matmul
and norm in one launch. Thresholds are compared with the rounded norm, as without the fusion.
"""

from __future__ import annotations

from torch import fx

from rana_fx.kernels.ops import masked_gemv, masked_gemv_gated, masked_gemv_normed
from rana_fx.passes.base import PassResult, PostGrad
from rana_fx.passes.fuse_norm import norm_of
from rana_fx.passes.fusible import fuse_each, operands, put, replace, why_not_launched

_TARGETS = (masked_gemv, masked_gemv_gated)


def fuse_product_norm(graph_module: fx.GraphModule, context: PostGrad) -> PassResult:
    """Fuse the norm into every masked matmul of one that only masked matmuls read."""
    results = [fuse_each(graph_module, target, "masked_gemv_normed", context, _fuse) for target in _TARGETS]
    return PassResult(sum(result.count for result in results), tuple(place for result in results for place in result.declined))


def _fuse(node: fx.Node) -> str | None:
    """Fuses the norm, or returns the reason why not."""
    given = operands(node)
    x = given.pop("v")
    norm = norm_of(x)
    if norm is None:
        return "what it reads is no root-mean-square norm of a tensor with one gain"
    if any(user.target not in (*_TARGETS, masked_gemv_normed) for user in x.users):
        return "its norm has other readers, for which it is computed anyway"
    if norm.h.meta["val"].dtype != x.meta["val"].dtype:
        return "its norm changes the dtype, and the fused matmul yields the dtype it reads"
    activation = node.args[-1] if node.target is masked_gemv_gated else None
    args = (norm.h, norm.gain, *given.values(), activation, norm.eps, norm.offset)
    reason = why_not_launched(masked_gemv_normed, args)
    if reason is not None:
        return reason
    if not replace(node, put(node, masked_gemv_normed, args)):
        return "the fused matmul has another memory layout"
    # other matmuls that read x are visited in later calls
    node.graph.erase_node(node)
    return None
