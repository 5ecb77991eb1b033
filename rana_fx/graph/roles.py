"""Which role every linear plays, and which of them belong together, from dataflow alone.

In: the ``Scan`` of one graph. Out: one ``Fact`` per linear (its role, the attention it feeds, what it depends on) and
one ``Block`` per gate/up -> pointwise -> down chain, whose pointwise part is extracted as a small module so that
calibration can replay it on any rows. Roles:

    attention_in   its output enters a product of activations (q, k, v, a fused qkv)
    attention_out  it reads the result of such a product (the output projection)
    up, down       the two ends of a block: linears over one tensor, pointwise operations, one linear
    router         its output chooses among experts (top-k)
    other          inside the residual stream, none of the above
    constant       it reads nothing of the batch: weights, positions, learned queries
    head, stem     outside of it: after the last residual join, or what makes the stream at its start
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from rana_fx.graph.dataflow import (
    descendants,
    is_column_slice,
    is_pointwise,
    is_row_view,
    last_dim_slice,
    mixes_tokens,
    op_name,
    picked_part,
    reach,
    row_source,
    shape_of,
    split_sizes,
    tensor_inputs,
    unbinds_parts,
)
from rana_fx.graph.functionalize import hidden_edges
from rana_fx.graph.linears import Linear, Scan, source_name, source_text

_SELECTIONS = {"topk", "argmax", "multinomial", "sort", "one_hot"}


@dataclass(frozen=True, eq=False)
class Block:
    """``down`` reads a pointwise function of the outputs of ``ups``, which all read one tensor."""

    ups: tuple[Linear, ...]
    down: Linear
    pointwise: fx.GraphModule  # (out of ups[0], out of ups[1], ...) rows -> rows of down's input
    activation: fx.GraphModule | None  # rows of one up -> the factor that CATS thresholds; None when there is one up
    gate: int  # index in ups of the linear behind the activation


@dataclass
class Fact:
    """What is known of one linear from one graph."""

    linear: Linear
    role: str = "other"
    attention: fx.Node | None = None
    block: Block | None = None
    joins_residual: bool = False
    feeds: frozenset[fx.Node] = frozenset()  # products with weights met first downstream
    starts_stream: bool = False  # no product before it, and its output is the stream that later ones are added to
    inputs: frozenset[str] = frozenset()  # names of the graph inputs it depends on


@dataclass
class Reading:
    """Everything one graph tells."""

    scan: Scan
    facts: list[Fact] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


def read_graph(scan: Scan) -> Reading:
    """Assign roles within one graph. Heads and stems are settled later, over all graphs of a model."""
    by_node = {linear.node: linear for linear in scan.linears}
    weights = descendants_of_weights(scan)
    activations = _activations(scan)
    reading = Reading(scan)
    ahead = hidden_edges(scan.linears[0].node.graph) if scan.linears else {}
    back: dict[fx.Node, list[fx.Node]] = {}
    for writer, readers in ahead.items():
        for reader in readers:
            back.setdefault(reader, []).append(writer)
    for linear in scan.linears:
        inside, met = reach(linear.node, stop=scan.products.__contains__, hidden=ahead)
        mixing = [node for node in inside if mixes_tokens(node, weights)]
        behind, above = reach(linear.node, stop=scan.products.__contains__, forward=False, hidden=back)
        fact = Fact(linear, feeds=frozenset(met))
        fact.joins_residual = any(_joins(node, inside | {linear.node}, activations) for node in inside)
        if fact.joins_residual and not above:
            later = descendants([linear.node]) - inside
            fact.starts_stream = any(_joins(node, inside | {linear.node}, later) for node in inside)
        fact.inputs = frozenset(_ancestral_inputs(linear.x))
        if row_source(linear.x) in scan.constant:
            fact.role = "constant"
        elif any(op_name(node) in _SELECTIONS for node in inside) and met_is_not_stream(linear, inside, activations):
            fact.role = "router"
        elif mixing:
            fact.role, fact.attention = "attention_in", max(mixing, key=_order(linear.node.graph))
        elif any(mixes_tokens(node, weights) for node in behind):
            fact.role = "attention_out"
        reading.facts.append(fact)
    _find_blocks(reading, by_node)
    return reading


def met_is_not_stream(linear: Linear, inside: set[fx.Node], activations: set[fx.Node]) -> bool:
    """A router's output reaches the selection without joining the residual stream first."""
    direct, _ = reach(
        linear.node, stop=lambda node: op_name(node) in _SELECTIONS or _joins(node, inside | {linear.node}, activations)
    )
    return any(op_name(user) in _SELECTIONS for node in (*direct, linear.node) for user in node.users)


def descendants_of_weights(scan: Scan) -> set[fx.Node]:
    """Nodes computed from Parameters alone (a weight, its transpose, a slice of an expert's weight)."""
    found = set(scan.weights)
    for node in next(iter(scan.weights), _none()).graph.nodes if scan.weights else ():
        if node.op in ("call_function", "call_method") and node.all_input_nodes:
            from_weights = [source in found for source in node.all_input_nodes]
            if all(from_weights) or (op_name(node) in ("getitem", "index", "index_select") and from_weights[0]):
                found.add(node)
    return found


def _none() -> fx.Node:
    return fx.Graph().placeholder("none")


def _activations(scan: Scan) -> set[fx.Node]:
    if not scan.linears:
        return set()
    graph = scan.linears[0].node.graph
    return {node for node in graph.nodes if node not in scan.constant}


def _order(graph: fx.Graph) -> Callable[[fx.Node], int]:
    return {node: position for position, node in enumerate(graph.nodes)}.__getitem__


def _joins(node: fx.Node, own: set[fx.Node], activations: set[fx.Node]) -> bool:
    """An addition of two activations one of which does not come from this linear alone: a residual join."""
    if node.op not in ("call_function", "call_method") or op_name(node) != "add":
        return False
    shape = shape_of(node)
    if shape is None or not len(shape):
        return False
    others = [source for source in tensor_inputs(node) if source not in own and source in activations]
    return bool(others)


def _ancestral_inputs(node: fx.Node) -> set[str]:
    names: set[str] = set()
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            names.add(source_text(current) or source_name(current))
        todo.extend(current.all_input_nodes)
    return names


# ---- blocks


def _find_blocks(reading: Reading, by_node: dict[fx.Node, Linear]) -> None:
    facts = {fact.linear: fact for fact in reading.facts}
    for linear in reading.scan.linears:
        taken = {f.linear.node for f in reading.facts if f.role in ("attention_in", "router", "constant")}
        block = None if facts[linear].role == "constant" else _block(linear, by_node, taken, reading.scan)
        if block is None or any(facts[up].block is not None or facts[up].role == "down" for up in block.ups):
            continue
        reading.blocks.append(block)
        for member in (*block.ups, linear):
            facts[member].block = block
            facts[member].role = "down" if member is linear else "up"


def _block(down: Linear, by_node: dict[fx.Node, Linear], taken: set[fx.Node], scan: Scan) -> Block | None:
    chain: set[fx.Node] = set()
    leaves: list[fx.Node] = []
    constants: set[fx.Node] = set()
    todo = [down.x]
    while todo:
        node = todo.pop()
        if node in chain or node in leaves or node in constants:
            continue
        if node in by_node:
            leaves.append(node)
        elif node.op in ("placeholder", "get_attr"):
            if _has_rows(node, scan):
                return None
            constants.add(node)
        elif _is_link(node):
            chain.add(node)
            todo.extend(tensor_inputs(node))
            if is_column_slice(node) and op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
                todo.append(node.args[0])
        else:
            return None
    nonlinear = any(
        (is_pointwise(n) and not is_row_view(n) and op_name(n) not in ("mul", "div", "add", "sub")) or op_name(n) == "glu"
        for n in chain
    )
    gated = len(leaves) > 1
    if not leaves or not (nonlinear or gated) or any(leaf in taken for leaf in leaves):
        return None
    order = _order(down.node.graph)
    leaves.sort(key=order)
    ups = tuple(by_node[leaf] for leaf in leaves)
    if len({up.source for up in ups}) != 1 or down in ups:
        return None
    # an up whose output also goes elsewhere (a fused qkv+mlp) is not the block's own
    for leaf in leaves:
        inside, met = reach(leaf, stop=lambda node: node is down.node)
        if inside - chain or not met:
            return None
    pointwise = _extract(sorted(chain, key=order), leaves, constants, down.x)
    if pointwise is None:
        return None
    gate, activation = _activation(sorted(chain, key=order), leaves, constants, down.x)
    return Block(ups, down, pointwise, activation, gate)


def _is_link(node: fx.Node) -> bool:
    """What may lie between up and down: every row of the result is a function of the same row of the sources."""
    kinds = (is_row_view, is_column_slice, is_pointwise, split_sizes, unbinds_parts, picked_part)
    return op_name(node) == "glu" or any(kind(node) is not None and kind(node) is not False for kind in kinds)


def _has_rows(node: fx.Node, scan: Scan) -> bool:
    """An activation that enters the chain from outside makes it no block; a weight of one row or a scalar may."""
    shape = shape_of(node)
    if shape is None or len(shape) <= 1:
        return False
    return node not in scan.constant or any(size != 1 for size in shape[:-1])


def _extract(chain: list[fx.Node], leaves: list[fx.Node], constants: set[fx.Node], result: fx.Node) -> fx.GraphModule | None:
    """The chain as a module over (rows, features) inputs: row views dropped, slices and dims counted from the last."""
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {leaf: graph.placeholder(f"u{i}") for i, leaf in enumerate(leaves)}
    mapped |= {constant: graph.placeholder(f"c{i}") for i, constant in enumerate(sorted(constants, key=lambda n: n.name))}
    for node in chain:
        source = node.args[0] if node.args else None
        if is_row_view(node) or unbinds_parts(node):
            assert isinstance(source, fx.Node)
            mapped[node] = mapped[source]
            continue
        if is_column_slice(node) and isinstance(source, fx.Node) and shape_of(source) is not None:
            shape = shape_of(source)
            assert shape is not None
            rest = last_dim_slice(node, len(shape))
            if rest is None:
                return None
            copy = graph.node_copy(node, lambda old: mapped[old])
            copy.args = (mapped[source], *rest)  # type: ignore[arg-type]
            copy.kwargs = {}
        elif split_sizes(node) is not None:
            copy = graph.call_method("unflatten", (mapped[node.args[0]], -1, split_sizes(node)))  # type: ignore[index]
        elif picked_part(node) is not None:
            copy = graph.call_method("select", (mapped[node.args[0]], -2, picked_part(node)))  # type: ignore[index]
        elif op_name(node) == "glu":
            copy = graph.node_copy(node, lambda old: mapped[old])
            assert isinstance(source, fx.Node)
            copy.args, copy.kwargs = (mapped[source], -1), {}
        else:
            if any(old not in mapped for old in node.all_input_nodes):
                return None  # depends on a symbolic size or another non-tensor: cannot be replayed on other rows
            copy = graph.node_copy(node, lambda old: mapped[old])
        copy.meta = {}
        mapped[node] = copy
    graph.output(mapped[result])
    module = fx.GraphModule({}, graph)
    module.rana_constants = sorted(constants, key=lambda n: n.name)  # type: ignore[assignment]
    return module


def _activation(
    chain: list[fx.Node], leaves: list[fx.Node], constants: set[fx.Node], result: fx.Node
) -> tuple[int, fx.GraphModule | None]:
    """With two ups, the product's factor that went through the activation: ``act(gate)`` in ``act(gate) * up``.

    Nothing may come between the product and down: where the factor is zero, so must be what down reads.
    """
    if len(leaves) != 2:
        return 0, None
    depends: dict[fx.Node, set[int]] = {leaf: {i} for i, leaf in enumerate(leaves)}
    curved: dict[fx.Node, bool] = dict.fromkeys(leaves, False)
    for node in chain:
        sources = [s for s in node.all_input_nodes if s in depends]
        depends[node] = set().union(*(depends[s] for s in sources)) if sources else set()
        curved[node] = any(curved[s] for s in sources) or (
            is_pointwise(node) and not is_row_view(node) and op_name(node) not in ("mul", "div")
        )
        if node is row_source(result) and op_name(node) == "mul" and len(sources) == 2 and depends[node] == {0, 1}:
            for factor, other in (sources, sources[::-1]):
                if curved[factor] and not curved[other] and len(depends[factor]) == len(depends[other]) == 1:
                    (gate,) = depends[factor]
                    needed = [n for n in chain[: chain.index(node)] if depends.get(n) == {gate}]
                    return gate, _extract(needed, [leaves[gate]], constants, factor)
    return 0, None
