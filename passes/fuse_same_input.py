"""Masked products that read one tensor, each under a mask of its own, in one launch: q, k and v; gate and up.

    q, k, v = rana.masked_gemv(x, tau_q, Wq), rana.masked_gemv(x, tau_k, Wk), rana.masked_gemv(x, tau_v, Wv)
  becomes
    y = rana.masked_gemv_parts(x, [tau_q, tau_k, tau_v], [Wq, Wk, Wv], [], density); q, k, v = y[..., :a], y[..., a:b], y[..., b:]

In: an aten graph past autograd, few tokens on a GPU, masked products told by their operands. Out: the same graph, rewritten in
place. Products are left apart where skipping rows is not expected to win for them together (kernels/cost.py), where weights are
in 8 or 4 bits or a skipped row is no stretch of memory, and where operands of one are computed after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from rana_fx.formats import is_plain
from rana_fx.kernels import cost
from rana_fx.kernels.ops import masked_gemv, masked_gemv_parts
from rana_fx.kernels.triton.config import MOST_PARTS

_aten = torch.ops.aten
_NAMES = ("v", "tau", "weight", "bias", "scale", "density")
_DEFAULTS = {"bias": None, "scale": None, "density": 0.5}
_MOVES = {_aten.permute.default, _aten.t.default, _aten.transpose.int, _aten.view.default}


def fuse_parts(graph: fx.Graph, few: Callable[[object], bool]) -> int:
    """Returns how many launches it made. few: whether a node holds few enough tokens on the right device."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is masked_gemv and few(node.args[0]) and _fits(node):
            given = operands(node)
            key = (given["v"], given["weight"].meta["val"].dtype, given["bias"] is None)
            groups.setdefault(key, []).append(node)
    made = 0
    for nodes in groups.values():
        for start in range(0, len(nodes), MOST_PARTS):
            made += _together(graph, nodes[start : start + MOST_PARTS])
    return made


def operands(node: fx.Node) -> dict[str, Any]:
    """Of a masked product, by name, in the order it takes them."""
    given = _DEFAULTS | dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    return {name: given[name] for name in _NAMES}


def _fits(node: fx.Node) -> bool:
    given = operands(node)
    nodes = [given["tau"], given["weight"], *([] if given["bias"] is None else [given["bias"]])]
    values = [part.meta.get("val") if isinstance(part, fx.Node) else None for part in nodes]
    if given["scale"] is not None or not all(isinstance(value, Tensor) for value in values):
        return False
    tau, weight, *bias = values
    assert isinstance(weight, Tensor) and isinstance(tau, Tensor)
    sizes_known = all(isinstance(size, int) for size in (*weight.shape, *weight.stride()))
    flat = all(isinstance(value, Tensor) and value.is_contiguous() for value in (tau, *bias))
    return sizes_known and is_plain(weight) and weight.stride(1) == 1 and flat


def _together(graph: fx.Graph, nodes: list[fx.Node]) -> int:
    first, order = nodes[0], {node: index for index, node in enumerate(graph.nodes)}
    nodes = [node for node in nodes if all(_is_before(operand, first, order) for operand in node.all_input_nodes)]
    if len(nodes) < 2 or not _pays(nodes):
        return 0
    for node in nodes:
        for operand in node.all_input_nodes:
            if order[operand] > order[first]:
                first.prepend(operand)
    parts = [operands(node) for node in nodes]
    v, value = parts[0]["v"], first.meta["val"]
    sizes = [part["weight"].meta["val"].shape[1] for part in parts]
    biases = [part["bias"] for part in parts if part["bias"] is not None]
    lists = ([part["tau"] for part in parts], [part["weight"] for part in parts], biases)
    with graph.inserting_before(first):
        fused = graph.call_function(masked_gemv_parts, (v, *lists, _density(parts, sizes)))
        whole = value.new_empty((*value.shape[:-1], sum(sizes)))
        fused.meta = meta_of(first) | {"val": whole}
        stop = 0
        for node, size in zip(nodes, sizes, strict=True):
            start, stop = stop, stop + size
            cut = graph.call_function(_aten.slice.Tensor, (fused, value.dim() - 1, start, stop))
            cut.meta = meta_of(node) | {"val": whole.new_empty_strided((*value.shape[:-1], size), whole.stride())}
            # what follows may view it; at one token this costs nothing, at a few it fuses with the consumer
            part = graph.call_function(_aten.clone.default, (cut,), {"memory_format": torch.contiguous_format})
            part.meta = meta_of(node)
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
    return 1


def _is_before(operand: fx.Node, place: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether it stands before ``place``, or is a view that can."""
    if order[operand] < order[place]:
        return True
    return operand.target in _MOVES and all(order[source] < order[place] for source in operand.all_input_nodes)


def _pays(nodes: list[fx.Node]) -> bool:
    parts = [operands(node) for node in nodes]
    weights, value = [part["weight"].meta["val"] for part in parts], parts[0]["v"].meta["val"]
    if value.device.type != "cuda":
        return True
    sizes = [weight.shape[1] for weight in weights]
    density, bits = _density(parts, sizes), 8 * weights[0].element_size()
    device = cost.nearest(value.device)
    return cost.prefers_masked(weights[0].shape[0], sum(sizes), math.prod(value.shape[:-1]), density, device, bits=bits)


def _density(parts: list[dict[str, Any]], sizes: list[int]) -> float:
    kept: float = sum(part["density"] * size for part, size in zip(parts, sizes, strict=True))
    return kept / sum(sizes)


def meta_of(node: fx.Node) -> dict[str, object]:
    """What holds for a node of the same value. Inductor takes the arguments that AOTAutograd recorded for this one's own."""
    return {key: value for key, value in node.meta.items() if key != "eager_input_vals"}
