"""Masked matmuls and routers that fusing passes may start from, their operands, and nodes that replace them.

In: an aten graph past autograd. Out: the nodes of an operation that read few enough tokens on a device with kernels, and for the
others the reason why they are not fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor, fx

from rana_fx.graph.fake_values import fake_run
from rana_fx.kernels.ops import arguments_of
from rana_fx.kernels.problem import operand_of_tensor, problem_of
from rana_fx.kernels.registry import REFERENCE, choose, tokens_fused, why
from rana_fx.kernels.triton.config import TOKENS_AT_ONCE
from rana_fx.passes.base import Declined, PassResult, PostGrad

_NAMES = ("v", "tau", "weight", "bias", "scale", "density")
_DEFAULTS = {"bias": None, "scale": None, "density": 0.5}


def fusible(
    graph: fx.Graph, target: Callable[..., Any], into: str, devices: tuple[str, ...] | None
) -> tuple[list[fx.Node], list[Declined]]:
    """Calls of ``target``, in order, that read few tokens on a device which computes the operation ``into``; and the others.

    Args:
        devices: types of device to fuse on; None: those for which the registry has a lowering of ``into``.
    """
    taken, declined = [], []
    for node in graph.find_nodes(op="call_function", target=target):
        reason = _why_left(node.args[0], into, devices)
        if reason is None:
            taken.append(node)
        else:
            declined.append(Declined(node.name, reason))
    return taken, declined


def fuse_each(
    graph_module: fx.GraphModule,
    target: Callable[..., Any],
    into: str,
    context: PostGrad,
    fuse: Callable[[fx.Node], str | None],
) -> PassResult:
    """Apply ``fuse`` to every fusible call of ``target``; it rewrites the graph around it, or returns the reason why not."""
    nodes, declined = fusible(graph_module.graph, target, into, context.devices)
    count = 0
    for node in nodes:
        reason = fuse(node)
        if reason is None:
            count += 1
        else:
            declined.append(Declined(node.name, reason))
    return PassResult(count, tuple(declined))


def _why_left(node: object, into: str, devices: tuple[str, ...] | None) -> str | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return "what it reads has no fake value"
    device, tokens = value.device.type, math.prod(value.shape[:-1])
    most = tokens_fused(into, device) if devices is None else TOKENS_AT_ONCE if device in devices else 0
    if not most:
        return f"it is on {device}, where nothing computes {into} in one launch"
    if not isinstance(tokens, int):
        return "the number of tokens varies"
    return None if 1 <= tokens <= most else f"{tokens} tokens, where kernels take 1 to {most} at once"


def operands(node: fx.Node) -> dict[str, Any]:
    """Operands of a masked matmul by name, in the order of its schema."""
    given = _DEFAULTS | dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    return {name: given[name] for name in _NAMES}


def why_not_launched(target: torch._ops.OpOverload, args: tuple[Any, ...]) -> str | None:
    """Why no kernel is expected to compute a call faster than a dense matmul, compiled; None too on devices other than GPUs, of
    which nothing was measured.
    """
    op = target._schema.name.removeprefix("rana::")
    values: Any = fx.map_arg(args, lambda node: node.meta["val"])
    leaves: list[Any] = optree.tree_leaves(values)
    tensors = [value for value in leaves if isinstance(value, Tensor)]
    if not all(isinstance(number, int) for tensor in tensors for number in (*tensor.shape, *tensor.stride())):
        return "sizes vary"
    problem = problem_of(op, arguments_of(op, values, {}), operand_of_tensor, compiled=True)
    if problem.device.type != "cuda" or choose(problem).name != REFERENCE:
        return None
    return "; ".join(f"{row.name}: {reason}" for row, reason in why(problem) if row.device == "cuda")


def put(like: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], *, at: fx.Node | None = None, **kwargs: Any) -> fx.Node:
    """``target(*args, **kwargs)`` before ``at``, or before ``like``, with the metadata of ``like`` and a value of its own."""
    with like.graph.inserting_before(like if at is None else at):
        node = like.graph.call_function(target, args, kwargs)
    # Inductor would use the arguments that AOTAutograd recorded for ``like`` as those of this node
    node.meta = {key: value for key, value in like.meta.items() if key != "eager_input_vals"}
    node.meta["val"] = fake_run(node)
    return node


def replace(old: fx.Node, new: fx.Node) -> bool:
    """Replace all uses of ``old`` by ``new`` and return True if both have the same memory layout, else erase ``new``."""
    if _same_layout(old.meta["val"], new.meta["val"]):
        old.replace_all_uses_with(new)
        return True
    new.graph.erase_node(new)
    return False


def _same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of known sizes have the same shape, dtype and strides. A dimension of size 1 has any stride."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or first == second for size, first, second in strides)
