"""Which role every linear plays, from dataflow alone.

In: the ``Scan`` of one graph. Out: a ``TracedGraph`` with one ``Occurrence`` per linear (its role, the attention it feeds, what
it depends on) and the MLP blocks found in it. Roles:

    attention_in   its output enters a product of activations (q, k, v, a fused qkv)
    attention_out  it reads the result of such a product (the output projection)
    up, down       the two ends of an MLP block (rana_fx.graph.mlp_blocks)
    router         its output chooses among experts (top-k)
    other          inside the residual stream, none of the above
    constant       it reads nothing of the batch: weights, positions, learned queries
    head, stem     outside of it: after the last residual join, or what makes the stream at its start
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from rana_fx.graph.dataflow import ancestors, descendants, mixes_tokens, reach, row_source, shape_of, tensor_inputs
from rana_fx.graph.functionalize import hidden_edges
from rana_fx.graph.linears import Linear, Scan, source_name, source_text
from rana_fx.graph.mlp_blocks import TracedMlp, find_mlp, order_of
from rana_fx.graph.ops import LOOKUPS, SELECTIONS, is_call, op_name

_Edges = Mapping[fx.Node, list[fx.Node]]


@dataclass
class Occurrence:
    """One linear in one graph, and what follows from its place there."""

    linear: Linear
    role: str = "other"
    attention: fx.Node | None = None  # the last product of activations that its output enters
    block: TracedMlp | None = None
    joins_residual: bool = False
    feeds: frozenset[fx.Node] = frozenset()  # the first matmuls with weights downstream
    starts_stream: bool = False  # no matmul before it, and its output is the stream that later ones are added to
    inputs: frozenset[str] = frozenset()  # names of the graph inputs it depends on


@dataclass
class TracedGraph:
    """The linears and blocks of one graph. ``values``: the real tensors behind graph inputs, where they are known."""

    scan: Scan
    values: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    occurrences: list[Occurrence] = field(default_factory=list)
    blocks: list[TracedMlp] = field(default_factory=list)


def read_graph(scan: Scan, values: Mapping[fx.Node, Tensor] | None = None) -> TracedGraph:
    """Assign roles within one graph. Heads and stems are settled later, over all graphs of a model."""
    traced = TracedGraph(scan, values or {})
    if scan.linears:
        graph = scan.linears[0].node.graph
        weights = nodes_of_weights(scan)
        activations = {node for node in graph.nodes if node not in scan.constant}
        ahead = hidden_edges(graph)
        back: dict[fx.Node, list[fx.Node]] = {}
        for writer, readers in ahead.items():
            for reader in readers:
                back.setdefault(reader, []).append(writer)
        traced.occurrences = [_occurrence(linear, scan, weights, activations, ahead, back) for linear in scan.linears]
    _find_blocks(traced)
    return traced


def _occurrence(
    linear: Linear, scan: Scan, weights: set[fx.Node], activations: set[fx.Node], ahead: _Edges, back: _Edges
) -> Occurrence:
    inside, met = reach(linear.node, stop=scan.products.__contains__, hidden=ahead)
    mixing = [node for node in inside if mixes_tokens(node, weights)]
    behind, above = reach(linear.node, stop=scan.products.__contains__, forward=False, hidden=back)
    own = inside | {linear.node}
    found = Occurrence(linear, feeds=frozenset(met))
    found.joins_residual = any(_joins(node, own, activations) for node in inside)
    if found.joins_residual and not above:
        later = descendants([linear.node]) - inside
        found.starts_stream = any(_joins(node, own, later) for node in inside)
    inputs = (node for node in ancestors([linear.x]) if node.op == "placeholder")
    found.inputs = frozenset(source_text(node) or source_name(node) for node in inputs)
    if row_source(linear.x) in scan.constant:
        found.role = "constant"
    elif any(op_name(node) in SELECTIONS for node in inside) and router_precedes_residual(linear, inside, activations):
        found.role = "router"
    elif mixing:
        found.role, found.attention = "attention_in", max(mixing, key=order_of(linear.node.graph))
    elif any(mixes_tokens(node, weights) for node in behind):
        found.role = "attention_out"
    return found


def router_precedes_residual(linear: Linear, inside: set[fx.Node], activations: set[fx.Node]) -> bool:
    """Whether a linear's output reaches a selection without joining the residual stream first."""
    own = inside | {linear.node}
    direct, _ = reach(linear.node, stop=lambda node: op_name(node) in SELECTIONS or _joins(node, own, activations))
    return any(op_name(user) in SELECTIONS for node in (*direct, linear.node) for user in node.users)


def nodes_of_weights(scan: Scan) -> set[fx.Node]:
    """Nodes computed from Parameters alone (a weight, its transpose, a slice of an expert's weight)."""
    found = set(scan.weights)
    for node in next(iter(scan.weights)).graph.nodes if scan.weights else ():
        if is_call(node) and node.all_input_nodes:
            from_weights = [source in found for source in node.all_input_nodes]
            if all(from_weights) or (op_name(node) in LOOKUPS and from_weights[0]):
                found.add(node)
    return found


def _joins(node: fx.Node, own: set[fx.Node], activations: set[fx.Node]) -> bool:
    """An addition of two activations one of which does not come from this linear alone: a residual join."""
    if not is_call(node) or op_name(node) != "add" or not shape_of(node):
        return False
    return any(source not in own and source in activations for source in tensor_inputs(node))


def _find_blocks(traced: TracedGraph) -> None:
    of_linear = {found.linear: found for found in traced.occurrences}
    by_node = {linear.node: linear for linear in traced.scan.linears}
    for linear in traced.scan.linears:
        taken = {found.linear.node for found in traced.occurrences if found.role in ("attention_in", "router", "constant")}
        block = None if of_linear[linear].role == "constant" else find_mlp(linear, by_node, taken, traced.scan)
        if block is None or any(of_linear[up].block is not None or of_linear[up].role == "down" for up in block.ups):
            continue
        traced.blocks.append(block)
        for member in (*block.ups, linear):
            of_linear[member].block = block
            of_linear[member].role = "down" if member is linear else "up"
