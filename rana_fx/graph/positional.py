"""Pass arguments by position that a call gives by name, as far as dataflow rules read them.

    torch.narrow(input=x, dim=-1, start=0, length=4)      becomes      torch.narrow(x, -1, 0, 4)
    F.silu(input=x, inplace=True)                         becomes      F.silu(x, inplace=True)

In: a Dynamo graph and the graphs of its regions. Out: the same graphs, in which the first argument of every call of a PyTorch
function is positional, and so are the leading arguments of operations that move data, since their dimensions are read from there.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.operator_schemas import get_signature_for_torch_op

from rana_fx.graph.ops import MOVEMENT, RESHAPES, is_call, op_name

_MOVES = MOVEMENT | RESHAPES


def by_position(graph_module: fx.GraphModule) -> int:
    """Change all graphs in place; returns the number of calls changed."""
    changed = 0
    for part in graph_module.modules():
        if isinstance(part, fx.GraphModule):
            here = sum(_move(node) for node in part.graph.nodes)
            if here:
                part.recompile()
            changed += here
    return changed


def _move(node: fx.Node) -> bool:
    if not is_call(node) or not node.kwargs or (node.args and op_name(node) not in _MOVES):
        return False
    names = _leading(node)
    if op_name(node) not in _MOVES:
        names = names[:1]  # others are read by name, too
    if names:
        kwargs = dict(node.kwargs)
        node.args = (*node.args, *(kwargs.pop(name) for name in names))
        node.kwargs = kwargs
    return bool(names)


def _leading(node: fx.Node) -> Sequence[str]:
    """Names of the arguments after the positional ones that may be positional, too; none where overloads disagree."""
    given, count = set(node.kwargs), len(node.args)
    found = set()
    for signature in _signatures(node.target):
        parameters = list(signature.parameters.values())
        rest = parameters[count:]
        needed = {one.name for one in rest if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
        if not needed <= given <= {one.name for one in rest}:
            continue
        names = []
        for one in rest:
            if one.kind is not one.POSITIONAL_OR_KEYWORD or one.name not in given:
                break
            names.append(one.name)
        found.add(tuple(names))
    return found.pop() if len(found) == 1 else ()


@functools.lru_cache(maxsize=1024)
def _signatures(target: Any) -> Sequence[inspect.Signature]:
    """Signatures of the overloads of a PyTorch function, or of the function of a method's name; none where they are not known."""
    function = getattr(torch, target, None) if isinstance(target, str) else target
    if isinstance(function, types.FunctionType) and (function.__module__ or "").partition(".")[0] == "torch":
        return [inspect.signature(function)]
    if isinstance(function, types.BuiltinFunctionType):
        found: Any = get_signature_for_torch_op(function)
        return found or ()
    return ()
