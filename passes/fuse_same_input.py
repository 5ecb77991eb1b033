"""Masked matmuls that read one tensor, each under a mask of its own, in one launch: q, k and v; gate and up.

    q, k, v = rana.masked_gemv(x, tau_q, Wq), rana.masked_gemv(x, tau_k, Wk), rana.masked_gemv(x, tau_v, Wv)
  becomes
    y = rana.masked_gemv_parts(x, [tau_q, tau_k, tau_v], [Wq, Wk, Wv], [], density); q, k, v = y[..., :a], y[..., a:b], y[..., b:]

In: an aten graph past autograd, few tokens on a GPU. Out: the same graph, rewritten in place. Matmuls stay separate
where no kernel is expected to be faster in one launch (kernels/registry.py), where weights are in 8 or 4 bits or their rows
are not contiguous, and where operands of one are computed after another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rana_fx.formats import is_plain
from rana_fx.graph.ops import ATEN_PERMUTES
from rana_fx.kernels.ops import masked_gemv, masked_gemv_parts
from rana_fx.kernels.triton.config import MOST_PARTS
from rana_fx.passes.base import Declined, PassResult, PostGrad
from rana_fx.passes.fusible import fusible, operands, put, replace, why_not_launched

_aten = torch.ops.aten
_VIEWS = ATEN_PERMUTES | {_aten.view.default}


def fuse_same_input(graph_module: fx.GraphModule, context: PostGrad) -> PassResult:
    """Fuse all masked matmuls of one tensor, up to ``MOST_PARTS`` in a launch. Counts launches."""
    matmuls, declined = fusible(graph_module.graph, masked_gemv, "masked_gemv_parts", context.devices)
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in matmuls:
        reason = _why_unfit(node)
        if reason is not None:
            declined.append(Declined(node.name, reason))
            continue
        given = operands(node)
        key = (given["v"], given["weight"].meta["val"].dtype, given["bias"] is None)
        groups.setdefault(key, []).append(node)
    made = 0
    for nodes in groups.values():
        for start in range(0, len(nodes), MOST_PARTS):
            left = _fuse_parts(nodes[start : start + MOST_PARTS])
            made += len(left) < len(nodes[start : start + MOST_PARTS])
            declined += left
    return PassResult(made, tuple(declined))


def _why_unfit(node: fx.Node) -> str | None:
    """Why a masked matmul cannot share a launch, or None."""
    given = operands(node)
    nodes = [given["tau"], given["weight"], *([] if given["bias"] is None else [given["bias"]])]
    values = [part.meta.get("val") if isinstance(part, fx.Node) else None for part in nodes]
    if given["scale"] is not None:
        return "its weight is in 8 or 4 bits"
    if not all(isinstance(value, Tensor) for value in values):
        return "one of its operands has no fake value"
    tau, weight, *bias = values
    assert isinstance(weight, Tensor) and isinstance(tau, Tensor)
    if not all(isinstance(size, int) for size in (*weight.shape, *weight.stride())):
        return "the size of its weight varies"
    if not is_plain(weight) or weight.stride(1) != 1:
        return "the rows of its weight are not contiguous"
    flat = all(isinstance(value, Tensor) and value.is_contiguous() for value in (tau, *bias))
    return None if flat else "its thresholds or its bias are not contiguous"


def _fuse_parts(nodes: list[fx.Node]) -> list[Declined]:
    """Puts these into one launch, except those with operands that are computed too late; returns those not fused."""
    first, order = nodes[0], {node: index for index, node in enumerate(nodes[0].graph.nodes)}
    late = [node for node in nodes if not all(_is_before(operand, first, order) for operand in node.all_input_nodes)]
    left = [Declined(node.name, f"one of its operands is computed after {first.name}") for node in late]
    nodes = [node for node in nodes if node not in late]
    if len(nodes) < 2:
        return [*left, Declined(first.name, "no other masked matmul of the same tensor has the same dtype and a bias likewise")]
    parts = [operands(node) for node in nodes]
    sizes = [part["weight"].meta["val"].shape[1] for part in parts]
    biases = [part["bias"] for part in parts if part["bias"] is not None]
    lists = ([part["tau"] for part in parts], [part["weight"] for part in parts], biases)
    args = (parts[0]["v"], *lists, _density(parts, sizes))
    reason = why_not_launched(masked_gemv_parts, args)
    if reason is not None:
        return left + [Declined(node.name, f"in one launch of all {reason}") for node in nodes]
    for node in nodes:
        for operand in node.all_input_nodes:
            if order[operand] > order[first]:
                first.prepend(operand)
    fused = put(first, masked_gemv_parts, args)
    stop = 0
    for node, size in zip(nodes, sizes, strict=True):
        start, stop = stop, stop + size
        cut = put(node, _aten.slice.Tensor, (fused, fused.meta["val"].dim() - 1, start, stop), at=first)
        # consumers may view the part; for one token the copy costs nothing, for a few it fuses with the consumer
        part = put(node, _aten.clone.default, (cut,), at=first, memory_format=torch.contiguous_format)
        assert replace(node, part)
    for node in nodes:
        node.graph.erase_node(node)
    return left


def _is_before(operand: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether an operand is computed before ``node``, or is a view that can be moved there."""
    if order[operand] < order[node]:
        return True
    return operand.target in _VIEWS and all(order[source] < order[node] for source in operand.all_input_nodes)


def _density(parts: list[dict[str, Any]], sizes: list[int]) -> float:
    """The mean density, weighted by the number of columns."""
    kept: float = sum(part["density"] * size for part, size in zip(parts, sizes, strict=True))
    return kept / sum(sizes)
