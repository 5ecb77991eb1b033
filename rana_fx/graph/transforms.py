"""Nodes of a graph inside a ``torch.func`` transform (grad, vjp, jvp, vmap and their compositions) or on dual tensors.

    level = _vmap_increment_nesting(3, "error"); b = _add_batch_dim(x, 0, level); y = linear(b, w); ...; _vmap_decrement_nesting()

In: a Dynamo graph, which opens and closes levels of transforms by calls such as these. Out: the nodes between them. Their fake
values are wrapped tensors of a level that was closed when tracing ended: they have shapes, but operations cannot run on them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from rana_fx.graph.dataflow import descendants
from rana_fx.graph.ops import is_call, op_name

_MODULES = ("torch._functorch", "torch._C._functorch", "torch.autograd.forward_ad")
_DUAL = frozenset({"_make_dual", "_unpack_dual", "_enter_dual_level", "_exit_dual_level", "_set_fwd_grad_enabled"})
_MAKE_DUAL = frozenset({"_make_dual", "make_dual"})
_OPENS, _CLOSES = "increment_nesting", "decrement_nesting"


def transformed(graph: fx.Graph) -> set[fx.Node]:
    """All nodes at a level of a transform, and all nodes computed from dual tensors that the graph makes."""
    depth = 0
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = op_name(node) if is_call(node) else ""
        if name.endswith(_CLOSES) and "autocast" not in name:
            depth -= 1
        if depth > 0:
            found.add(node)
        if name.endswith(_OPENS) and "autocast" not in name:
            depth += 1
    duals = [node for node in graph.nodes if is_call(node) and op_name(node) in _MAKE_DUAL]
    return found | descendants(duals)


def is_plumbing(node: fx.Node) -> bool:
    """Whether a node opens or closes a level, or wraps a tensor for one; its result depends on the open levels."""
    module = str(getattr(node.target, "__module__", None) or "")
    return is_call(node) and (module.startswith(_MODULES) or op_name(node) in _DUAL)


def plain(value: Any) -> Any:
    """Replace tensors wrapped by a transform by plain ones of their shape, dtype and device, on which operations can run."""
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if not isinstance(value, Tensor) or not is_wrapped(value):
        return value
    return unwrapped(value).new_empty(value.shape, requires_grad=value.requires_grad)


def unwrapped(value: Tensor) -> Tensor:
    """The innermost tensor under all levels of transforms, which has the storage."""
    while is_wrapped(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def unbatched(value: Tensor) -> Tensor:
    """The tensor that levels of transforms wrapped, with the dimensions of vmap in front; for use ``outside`` of them."""
    dimensions = []
    while is_wrapped(value):
        dimensions.append(torch._C._functorch.maybe_get_bdim(value))
        value = torch._C._functorch.get_unwrapped(value)
    for moved, dimension in enumerate(found for found in reversed(dimensions) if found >= 0):
        value = value.movedim(dimension + moved, 0)
    return value


def batched(value: Tensor, like: Tensor) -> Tensor | None:
    """What ``unbatched`` would make ``value`` of; None where another transform than vmap wrapped ``like``."""
    levels = []
    while is_wrapped(like):
        if not torch._C._functorch.is_batchedtensor(like):
            return None
        levels.append(torch._C._functorch.maybe_get_level(like))
        like = torch._C._functorch.get_unwrapped(like)
    for level in levels[::-1]:
        value = torch._C._functorch._add_batch_dim(value, len(levels) - 1 - levels[::-1].index(level), level)
    return value


def outside(value: Tensor) -> AbstractContextManager[object]:
    """A context outside of the transforms that wrapped a tensor, for what is no part of the function that they transform."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack() if is_wrapped(value) else nullcontext()


def is_wrapped(value: Tensor) -> bool:
    """Whether a tensor is wrapped by a level of a transform."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))
