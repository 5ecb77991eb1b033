"""Whether the backward pass of an ``autograd.Function`` is the derivative of its forward pass, tested numerically.

In: a call of ``autograd_function_apply`` and its forward and backward graphs. Out: the inputs that get no gradient from the
backward pass; or ``Unlike``, with the reason. Both passes run on random inputs of the traced shapes, with small and with large
output gradients, so that a backward pass that clips, scales or reverses gradients differs from the derivative. A forward pass
that draws random numbers differs between two runs and is rejected. The model's weights are not read, and the state of random
number generators is restored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.effects import described, frozen, hashable
from rana_fx.graph.operands import replayed
from rana_fx.graph.ops import MOVEMENT, is_call, op_name

_MOST_KNOWN = 256
_known: dict[object, frozenset[int] | Unlike] = {}
_SCALES = (1.0, 64.0)  # of the gradients of outputs
# bound of the relative rounding error of a chain of products in any order: far below the difference of another formula
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Unlike(Exception):  # noqa: N818
    """The backward pass is not the derivative, or cannot be compared. The text continues "an autograd.Function"."""


def undifferentiated(
    node: fx.Node, forward: fx.GraphModule, backward: fx.GraphModule, switches: Collection[fx.Node]
) -> frozenset[int]:
    """Positions of the inputs of ``forward`` that get no gradient from ``backward``. The result is cached by form and shapes.

    Args:
        switches: nodes of ``forward`` that set the grad mode.

    Raises:
        Unlike: the passes do not match, or cannot be compared.
    """
    key = _key(node, forward, backward)
    if key is not None and key in _known:
        found = _known[key]
        if isinstance(found, Unlike):
            raise found
        return found
    try:
        found = _tried(node, forward, backward, switches)
    except Unlike as unlike:
        found = unlike
    if key is not None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = found
    if isinstance(found, Unlike):
        raise found
    return found


def _key(node: fx.Node, forward: fx.GraphModule, backward: fx.GraphModule) -> object:
    """Cache key of the comparison, so that a Function of many layers is compared once; None where a body has attributes."""
    if any(inner.op == "get_attr" for body in (forward, backward) for inner in body.graph.nodes):
        return None
    fixed: Any = node.kwargs["non_differentiable_idx"]
    operands = tuple(described(value_of(item) if isinstance(item, fx.Node) else item) for item in node.args[2:])
    place: dict[int, int] = {}
    views = tuple((place.setdefault(id(root), len(place)), *map(_form_of, chain)) for root, chain in _views(node.args[2:]))
    return hashable((_form(forward), _form(backward), operands, views, tuple(fixed)))


def _form_of(movement: fx.Node) -> object:
    inputs = {source: position for position, source in enumerate(movement.all_input_nodes)}
    return movement.op, movement.target, frozen((movement.args, movement.kwargs), inputs)


def _form(body: fx.GraphModule) -> object:
    place = {inner: position for position, inner in enumerate(body.graph.nodes)}
    return tuple(
        (inner.op, None if inner.op == "placeholder" else inner.target, frozen((inner.args, inner.kwargs), place))
        for inner in place
    )


def _tried(node: fx.Node, forward: fx.GraphModule, backward: fx.GraphModule, switches: Collection[fx.Node]) -> frozenset[int]:
    constant: set[int] = set()
    for seed, scale in enumerate(_SCALES):
        generator = torch.Generator().manual_seed(seed)
        try:
            given = _Inputs(node.args[2:], generator)
            fixed: Any = node.kwargs["non_differentiable_idx"]
            devices = {leaf.device for leaf in given.values if isinstance(leaf, Tensor) and leaf.device.type == "cuda"}
            with torch.random.fork_rng(devices):
                constant = _compared(given, forward, backward, switches, scale, generator, fixed)
        except Unlike:
            raise
        except Exception as error:  # the code of the Function may raise anything on random inputs
            reason = str(error).split("\n")[0][:100]
            raise Unlike(f"whose passes cannot be compared ({type(error).__name__}: {reason})") from error
    return frozenset(constant)


def _views(operands: Sequence[Any]) -> list[tuple[Any, tuple[fx.Node, ...]]]:
    """For each operand the tensor that it shows and the movements that lead from there to it, where others show it, too.

    Dynamo computes ``w.T`` in a forward pass outside of it, so that ``w`` and ``w.T`` are two operands.
    """
    found = [_origin(operand) for operand in operands]
    shown = Counter(root for root, _ in found if isinstance(root, fx.Node))
    return [
        (root, chain) if isinstance(root, fx.Node) and shown[root] > 1 else (own, ())
        for own, (root, chain) in zip(operands, found, strict=True)
    ]


def _origin(operand: Any) -> tuple[Any, tuple[fx.Node, ...]]:
    chain: list[fx.Node] = []
    current = operand
    while isinstance(current, fx.Node) and is_call(current) and op_name(current) in MOVEMENT - {"detach"}:
        if len(current.all_input_nodes) != 1 or current.args[:1] != tuple(current.all_input_nodes):
            break
        chain.insert(0, current)
        current = current.all_input_nodes[0]
    shown = value_of(current) if isinstance(current, fx.Node) else None
    return (current, tuple(chain)) if isinstance(shown, Tensor) else (operand, ())


class _Inputs:
    """Random numbers in the places of a Function's operands; those that show one tensor are views of one."""

    def __init__(self, operands: Sequence[Any], generator: torch.Generator) -> None:
        self._views = _views(operands)
        roots = list(dict.fromkeys(root for root, _ in self._views if isinstance(root, fx.Node)))
        drawn = {root: _drawn(root, generator) for root in roots}
        self._drawn = [drawn[root] if isinstance(root, fx.Node) else root for root, _ in self._views]
        self.values = list(drawn.values())

    def made(self) -> list[Any]:
        """One for each operand, computed from what was drawn."""
        return [replayed(chain, value) if chain else value for value, (_, chain) in zip(self._drawn, self._views, strict=True)]

    def places(self) -> dict[int, list[int]]:
        """Positions in ``values`` of floating tensors -> positions of the operands that show it."""
        ids = {id(value): index for index, value in enumerate(self.values)}
        found: dict[int, list[int]] = {}
        for place, value in enumerate(self._drawn):
            if isinstance(value, Tensor) and value.is_floating_point():
                found.setdefault(ids[id(value)], []).append(place)
        return found


def _drawn(operand: Any, generator: torch.Generator) -> Any:
    """A random tensor with the metadata of a node's value; zeros for integers, since zero is a valid index."""
    value = value_of(operand) if isinstance(operand, fx.Node) else operand
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    shape = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    if not value.is_floating_point():
        return torch.zeros(shape, dtype=value.dtype, device=value.device)
    drawn = torch.randn(shape, generator=generator) / math.sqrt(shape[-1] if len(shape) > 1 else 1)
    return drawn.to(value.device, value.dtype)


def _compared(
    given: _Inputs,
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    switches: Collection[fx.Node],
    scale: float,
    generator: torch.Generator,
    fixed: Collection[int],
) -> set[int]:
    with torch.no_grad():
        outputs, saved = fx.Interpreter(forward).run(*given.made())
        gradients = [_gradient_of(y, place in fixed, scale, generator) for place, y in enumerate(outputs)]
        theirs = fx.Interpreter(backward).run(*gradients, *saved)
    places = given.places()
    wanted = [given.values[index].requires_grad_() for index in places]
    with torch.enable_grad():
        operands = given.made()
        again, _ = _WithGradients(forward, switches).run(*operands)
    if not all(_close(one, other) for one, other in zip(outputs, again, strict=True) if isinstance(one, Tensor)):
        raise Unlike("whose forward pass is not the same each time")
    flowing = [(y, g) for y, g in zip(again, gradients, strict=True) if g is not None and y.requires_grad]
    ours = torch.autograd.grad([y for y, _ in flowing], wanted, [g for _, g in flowing], allow_unused=True) if flowing else ()
    mine = dict(zip(places, ours, strict=False))
    constant = set(range(len(operands))).difference(*places.values())
    for index, shown in places.items():
        returned = [(operands[place], theirs[place]) for place in shown if theirs[place] is not None]
        if not returned:
            constant.update(shown)
            continue
        if any(gradient.shape != operand.shape for operand, gradient in returned):
            raise Unlike("whose backward pass is not the derivative of its forward pass")
        value, found = given.values[index], mine.get(index)
        (total,) = torch.autograd.grad([operand for operand, _ in returned], [value], [gradient for _, gradient in returned])
        if not _close(total, torch.zeros_like(total) if found is None else found):
            raise Unlike("whose backward pass is not the derivative of its forward pass")
    return constant


class _WithGradients(fx.Interpreter):
    """Runs a graph without the nodes that set the grad mode."""

    def __init__(self, graph_module: fx.GraphModule, switches: Collection[fx.Node]) -> None:
        super().__init__(graph_module)
        self._switches = switches

    def run_node(self, n: fx.Node) -> Any:
        return None if n in self._switches else super().run_node(n)


def _gradient_of(y: object, fixed: bool, scale: float, generator: torch.Generator) -> Tensor | None:
    if not isinstance(y, Tensor):
        return None
    if fixed or not y.is_floating_point():
        return torch.zeros_like(y)
    return (scale * torch.randn(y.shape, generator=generator)).to(y.device, y.dtype)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    first, second = one.detach().double(), other.detach().double()
    if not (first.isfinite().all() and second.isfinite().all()):
        raise Unlike("whose passes are not finite on random inputs, so that they cannot be compared")
    return bool((first - second).norm() <= _TOLERANCE.get(one.dtype, 0.0) * second.norm())
