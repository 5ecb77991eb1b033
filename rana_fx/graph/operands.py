"""Which Parameter, or which part of one, an operand of a graph is.

In: a node and the graph's Parameters. Out: an ``Operand``: the Parameter, the part of it that the node shows and that
part's real values; or the reason why the node is none although Parameters went into it. Only data movement
leads from a Parameter to an operand (transposes, slices, items, reshapes), so the matrix of a linear may be a whole
Parameter, some rows of a packed one (q, k, v in one), or a 3-D weight of attention heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx.formats import is_plain
from rana_fx.graph.dataflow import value_of
from rana_fx.graph.ops import CASTS, MOVEMENT, is_call, op_name
from rana_fx.ordinary import is_ordinary, wrapped


@dataclass(frozen=True, eq=False)
class Operand:
    """``node`` shows ``value``, a view of ``parameter`` (a copy where a reshape needs one)."""

    parameter: nn.Parameter
    source: fx.Node  # the graph input
    value: Tensor
    part: str  # "" for all of it, "[0:32]" for some rows
    flipped: bool  # a 2-D Parameter seen transposed


def operand(node: object, weights: Mapping[fx.Node, nn.Parameter]) -> Operand | str | None:
    """The operand; or the reason why it cannot be one; or None where no Parameter leads here by movement and casts."""
    if not isinstance(node, fx.Node):
        return None
    chain: list[fx.Node] = []
    cast = False
    current = node
    while current not in weights:
        if not is_call(current) or not current.args or not isinstance(current.args[0], fx.Node):
            return None
        name = op_name(current)
        if name in CASTS:
            cast |= _dtype(current.args[0]) != _dtype(current)
        elif name not in MOVEMENT or len(current.all_input_nodes) > 1:
            return None  # an index that is an activation selects an expert
        chain.append(current)
        current = current.args[0]
    parameter = weights[current]
    if not is_ordinary(parameter):
        return wrapped(parameter)
    if cast and not is_plain(parameter):
        return f"quantised weight ({parameter.dtype})"
    if cast:
        return "its weight is cast in the forward pass"
    value = replayed(chain[::-1], parameter.detach())
    if value is None:
        return "its weight is viewed by a symbolic size"
    part = "" if value.numel() == parameter.numel() else _part(chain[::-1], parameter)
    if part and parameter.dim() > 2:
        return None  # one matrix of a stack: experts, which see some of the tokens
    if part is None:
        return "its weight is an irregular part of a larger one"
    flipped = parameter.dim() == 2 == value.dim() and _flips(chain[::-1], parameter)
    if parameter.dim() == 2 and 1 in parameter.shape:
        flipped = value.shape == parameter.shape[::-1] != parameter.shape
    return Operand(parameter, current, value, part, flipped)


def _dtype(node: object) -> torch.dtype | None:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def replayed(chain: Sequence[fx.Node], value: Tensor) -> Tensor | None:
    """A chain of movements repeated on a tensor; None where it needs other values of the graph, such as symbolic sizes."""
    current: Any = value
    for node in chain:
        rest, kwargs = node.args[1:], dict(node.kwargs)
        if any(isinstance(leaf, fx.Node) for leaf in (*_flat(rest), *kwargs.values())):
            return None
        if op_name(node) not in CASTS:
            target: Any = node.target
            current = getattr(current, target)(*rest, **kwargs) if node.op == "call_method" else target(current, *rest, **kwargs)
    return current if isinstance(current, Tensor) else None


def _flat(items: Any) -> list[Any]:
    return [leaf for item in items for leaf in (_flat(item) if isinstance(item, (tuple, list)) else (item,))]


def _flips(chain: list[fx.Node], parameter: nn.Parameter) -> bool:
    """Whether a chain transposes. The Parameter's own strides do not show it: it may be stored by columns, or freed."""
    whole = torch.empty(parameter.shape, device="meta")
    view = replayed(chain, whole)
    return view is not None and view.stride() == whole.stride()[::-1] != whole.stride()


def _part(chain: list[fx.Node], parameter: nn.Parameter) -> str | None:
    """Where a part lies, as an index: "[0:32]" rows, "[:, 4:8]" columns; None if it is no block."""
    whole = torch.empty(parameter.shape, device="meta")  # contiguous: a view's strides show which dimensions it has
    view = replayed(chain, whole)
    if view is None or view._base is not whole:
        return None
    offset = view.storage_offset()
    pieces = []
    for size, stride in zip(whole.shape, whole.stride(), strict=True):
        first = offset // stride
        offset -= first * stride
        extent = next((n for n, s in zip(view.shape, view.stride(), strict=True) if s == stride and n > 1), 1)
        if first + extent > size:
            return None
        pieces.append(":" if extent == size else str(first) if extent == 1 else f"{first}:{first + extent}")
    while pieces and pieces[-1] == ":":
        pieces.pop()
    return f"[{', '.join(pieces)}]"


def base_name(site: str) -> str:
    """The Parameter's name in the name of a site: ``in_proj_weight[0:32]`` -> ``in_proj_weight``."""
    return site[: site.rindex("[")] if site.endswith("]") and "[" in site else site
