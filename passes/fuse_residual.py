"""Fuse the addition of a residual to a masked matmul into the matmul's launch.

    h2 = h + rana.masked_gemv(v, tau, At, c)
  becomes
    h2 = rana.masked_gemv_add(v, tau, At, c, None, density, h)

In: an aten graph past autograd (Inductor's post-grad graph), few tokens on a GPU. Out: the same graph, rewritten in place. The
sum is rounded once instead of twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rana_fx.kernels.ops import masked_gemv, masked_gemv_add
from rana_fx.passes.base import PassResult, PostGrad
from rana_fx.passes.fusible import fuse_each, operands, put, replace

_aten = torch.ops.aten


def fuse_residual(graph_module: fx.GraphModule, context: PostGrad) -> PassResult:
    """Fuse every masked matmul whose only use is an addition to a tensor of its own shape and dtype."""
    return fuse_each(graph_module, masked_gemv, "masked_gemv_add", context, _fuse)


def _fuse(node: fx.Node) -> str | None:
    """Fuses the residual, or returns the reason why not."""
    users = list(node.users)
    if len(users) != 1:
        return f"its output has {len(users)} readers"
    total = users[0]
    if total.target is not _aten.add.Tensor:
        return "its output is not added to anything"
    if total.kwargs.get("alpha", 1) != 1:
        return "one addend is scaled"
    others = [arg for arg in total.args if arg is not node]
    residual = others[0] if len(others) == 1 else None
    value, added = node.meta.get("val"), residual.meta.get("val") if isinstance(residual, fx.Node) else None
    if not isinstance(value, Tensor) or not isinstance(added, Tensor):
        return "it is added to no other tensor"
    if added.shape != value.shape or added.dtype != value.dtype:
        return "what it is added to has another shape or dtype"
    fused = put(total, masked_gemv_add, (*operands(node).values(), residual))
    if not replace(total, fused):
        return "the sum has another memory layout"
    node.graph.erase_node(total)
    node.graph.erase_node(node)
    return None
