"""Find the product of an activated gate with up in front of a down projection, and the operations between product and down.

    y = linear(f(g(act(linear(x, w_gate))) * linear(x, w_up)), w_down)

In: a down projection of a Dynamo graph and its gated adapter. Out: a ``Product``: where the gate may be masked, and whether zeros
reach down as zeros. f and g are identities in the graph that was calibrated; in other graphs they may be dropout in training, a
cast, a scale or a hook. f is any chain of pointwise operations and row views. g is dropout; the mask is calibrated before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from rana_fx.adapter import Adapter
from rana_fx.graph.dataflow import is_reshape, is_row_view, shape_of, statically_equal, tensor_inputs, walk
from rana_fx.graph.linears import Linear
from rana_fx.graph.ops import DROPOUT, IDENTITY, is_call, is_pointwise, op_name, writes_first
from rana_fx.passes.match import Match

_ZERO_AT_ZERO = {"mul", "neg", "abs", "relu"}  # yield zero where an operand is zero


@dataclass(frozen=True, eq=False)
class Product:
    """``node`` = ``factor`` * up. ``gate``, which ``reader`` reads, is ``factor`` in front of dropout.

    between: the nodes between the product and down, in order; empty where down reads the product.
    changes_zeros: the first of these that does not map zero to zero; None: where the product is zero, the input of down is zero.
    """

    node: fx.Node
    factor: fx.Node
    gate: fx.Node
    reader: fx.Node
    between: tuple[fx.Node, ...]
    changes_zeros: fx.Node | None

    def read_by(self, downs: Iterable[fx.Node]) -> bool:
        """Whether the product and the nodes between it and down have no other users than ``downs``."""
        inside = {*self.between, *downs}
        return all(user in inside for step in (self.node, *self.between) for user in step.users)

    @property
    def rows_stay(self) -> bool:
        """Whether down reads the rows of the gate: equal number, length and order."""
        before, after = shape_of(self.gate), shape_of(self.node)
        if before is None or after is None or len(before) != len(after):
            return False
        return all(map(statically_equal, before, after)) and all(is_reshape(n) or not is_row_view(n) for n in self.between)


def find_product(down: Linear, match: Match) -> Product | None:
    """The product nearest to down, or None where none is found."""
    return _search(down.x, match, (), None, set())


def _search(
    node: fx.Node, match: Match, between: tuple[fx.Node, ...], changes: fx.Node | None, seen: set[fx.Node]
) -> Product | None:
    if node in seen or node in match.named or not is_call(node):
        return None
    seen.add(node)
    factor = _gated_factor(node, match.adapter, match.named)
    if factor is not None:
        return Product(node, factor, *_before_dropout(factor, node), between, changes)
    if not (is_pointwise(node) or is_row_view(node)):
        return None
    for source in tensor_inputs(node):
        found = _search(source, match, (node, *between), changes if _keeps_zeros(node, source) else node, seen)
        if found is not None:
            return found
    return None


def _gated_factor(node: fx.Node, adapter: Adapter, named: Mapping[fx.Node, str]) -> fx.Node | None:
    """The factor of a product that depends on the gate and not on up, where another factor depends on up; else None."""
    factors = list(tensor_inputs(node)) if op_name(node) == "mul" else []
    behind = [_sites_behind(factor, named) for factor in factors]
    for factor, sites in zip(factors, behind, strict=True):
        others = set().union(*(found for found in behind if found is not sites))
        ups = others.intersection(adapter.also) if adapter.also else others - {adapter.gate}
        if adapter.gate in sites and ups and not sites.intersection(adapter.also):
            return factor
    return None


def _sites_behind(node: fx.Node, named: Mapping[fx.Node, str]) -> set[str]:
    """Names of the linears that a node depends on through pointwise operations and row views."""

    def sources(current: fx.Node) -> Iterable[fx.Node]:
        links = current not in named and is_call(current) and (is_pointwise(current) or is_row_view(current))
        return tensor_inputs(current) if links else ()

    return {named[found] for found in walk([node], sources) if found in named}


def _before_dropout(gate: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(the gate in front of dropout, its reader)."""
    while _drops(gate) and not writes_first(gate) and len(gate.users) == 1 and isinstance(gate.args[0], fx.Node):
        gate, reader = gate.args[0], gate
    return gate, reader


def _drops(node: fx.Node) -> bool:
    """Whether a node is dropout that sets elements to zero (alpha dropout sets them to another value)."""
    return is_call(node) and op_name(node) in DROPOUT and "alpha" not in op_name(node) and bool(node.args)


def _keeps_zeros(node: fx.Node, source: fx.Node) -> bool:
    """Whether a pointwise operation or a row view is zero wherever ``source`` is, as long as its other operands are finite."""
    name = op_name(node)
    if is_row_view(node) or _drops(node) or name in _ZERO_AT_ZERO or name in IDENTITY:
        return True
    return (
        name == "div" and node.args[:1] == (source,) and source not in _flat(node.args[1:]) and "rounding_mode" not in node.kwargs
    )


def _flat(args: Sequence[object]) -> set[object]:
    return {item for item in args if isinstance(item, fx.Node)}
