"""MLP blocks by dataflow: linears over one tensor, pointwise operations, one linear.

In: the linears of one graph. Out: for a down projection the ``TracedMlp`` it ends, with the pointwise part between its ups and
itself as a small module over rows, which recipes run on sampled tokens:

    down(pointwise(up_0(x), up_1(x), ...)),  where pointwise(u_0, u_1) may be silu(u_0) * u_1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from rana_fx.graph.dataflow import (
    is_column_slice,
    is_row_view,
    last_dim_slice,
    picked_part,
    reach,
    row_source,
    shape_of,
    split_sizes,
    tensor_inputs,
    unbinds_parts,
    walk,
)
from rana_fx.graph.effects import written
from rana_fx.graph.linears import Linear, Scan
from rana_fx.graph.ops import ARITHMETIC, SCALINGS, is_pointwise, op_name


@dataclass(frozen=True, eq=False)
class Rowwise:
    """A chain of operations as a module over rows: (tokens, features) for each input, then the ``constants`` of its graph."""

    module: fx.GraphModule
    constants: tuple[fx.Node, ...]  # nodes of the traced graph, in the order in which the module takes their values
    writes: bool = False  # whether it may write into its inputs


@dataclass(frozen=True, eq=False)
class TracedMlp:
    """``down`` reads a pointwise function of the outputs of ``ups``, which all read one tensor."""

    ups: tuple[Linear, ...]
    down: Linear
    pointwise: Rowwise  # rows of each up's output -> rows of down's input
    activation: Rowwise | None  # rows of one up's output -> the factor that CATS thresholds; None where there is one up
    gate: int  # index in ups of the linear behind the activation


def order_of(graph: fx.Graph) -> Callable[[fx.Node], int]:
    """Position of a node of a graph."""
    return {node: position for position, node in enumerate(graph.nodes)}.__getitem__


def find_mlp(down: Linear, linears: dict[fx.Node, Linear], taken: set[fx.Node], scan: Scan) -> TracedMlp | None:
    """The block that ``down`` ends. ``linears``: by node; ``taken``: nodes of those that are no ups."""
    chain = _chain_before(down, linears, scan)
    if chain is None:
        return None
    gated = len(chain.leaves) > 1
    nonlinear = any(_is_nonlinear(node) for node in chain.nodes)
    if not chain.leaves or not (nonlinear or gated) or any(leaf in taken for leaf in chain.leaves):
        return None
    ups = tuple(linears[leaf] for leaf in chain.leaves)
    if len({up.source for up in ups}) != 1 or down in ups:
        return None
    # an up whose output also goes elsewhere (a fused qkv+mlp) is not the block's own
    for leaf in chain.leaves:
        inside, met = reach(leaf, stop=lambda node: node is down.node)
        if inside - set(chain.nodes) or not met:
            return None
    pointwise = chain.extract(chain.nodes, chain.leaves, down.x)
    if pointwise is None:
        return None
    gate, activation = _activation(chain, down.x)
    return TracedMlp(ups, down, pointwise, activation, gate)


def _is_nonlinear(node: fx.Node) -> bool:
    return op_name(node) == "glu" or (is_pointwise(node) and not is_row_view(node) and op_name(node) not in ARITHMETIC)


@dataclass(frozen=True, eq=False)
class _Chain:
    """What lies between linears and a later one: all in the graph's order."""

    nodes: list[fx.Node]
    leaves: list[fx.Node]  # the linears it starts from
    constants: tuple[fx.Node, ...]  # by name

    def extract(self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], result: fx.Node) -> Rowwise | None:
        """The chain over (rows, features) inputs: row views dropped, slices and dims counted from the last."""
        graph = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {leaf: graph.placeholder(f"u{i}") for i, leaf in enumerate(inputs)}
        mapped |= {constant: graph.placeholder(f"c{i}") for i, constant in enumerate(self.constants)}
        for node in nodes:
            copy = _copy(graph, node, mapped)
            if copy is None:
                return None
            mapped[node] = copy
        graph.output(mapped[result])
        return Rowwise(fx.GraphModule({}, graph), self.constants, any(written(node) for node in nodes))


def _chain_before(down: Linear, linears: dict[fx.Node, Linear], scan: Scan) -> _Chain | None:
    """What down's input is computed by, back to linears; None where there are other than rowwise operations."""
    chain: set[fx.Node] = set()
    leaves: list[fx.Node] = []
    constants: list[fx.Node] = []

    def sources(node: fx.Node) -> Iterator[fx.Node]:
        if node not in chain:
            return
        yield from tensor_inputs(node)
        if is_column_slice(node) and op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
            yield node.args[0]

    if down.node in scan.unseen:
        return None
    for node in walk([down.x], sources):
        if node in scan.unseen and node not in linears:
            return None  # what it reads was written under another name
        if node in linears:
            leaves.append(node)
        elif node.op in ("placeholder", "get_attr"):
            if _has_rows(node, scan):
                return None
            constants.append(node)
        elif _is_rowwise(node):
            chain.add(node)
        else:
            return None
    order = order_of(down.node.graph)
    return _Chain(sorted(chain, key=order), sorted(leaves, key=order), tuple(sorted(constants, key=lambda node: node.name)))


def _is_rowwise(node: fx.Node) -> bool:
    """What may lie between up and down: every row of the result is a function of the same row of the sources."""
    kinds = (is_row_view, is_column_slice, is_pointwise, split_sizes, unbinds_parts, picked_part)
    return op_name(node) == "glu" or any(kind(node) is not None and kind(node) is not False for kind in kinds)


def _has_rows(node: fx.Node, scan: Scan) -> bool:
    """An activation that enters the chain from outside makes it no block; a weight of one row or a scalar may."""
    shape = shape_of(node)
    if shape is None or len(shape) <= 1:
        return False
    return node not in scan.constant or any(size != 1 for size in shape[:-1])


def _copy(graph: fx.Graph, node: fx.Node, mapped: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """One operation of a chain in the graph over rows; None where it cannot run on other rows."""
    source = node.args[0] if node.args else None
    if is_row_view(node) or unbinds_parts(node):
        assert isinstance(source, fx.Node)
        return mapped[source]
    shape = shape_of(source) if isinstance(source, fx.Node) else None
    if is_column_slice(node) and isinstance(source, fx.Node) and shape is not None:
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
            return None  # depends on a symbolic size or another non-tensor
        copy = graph.node_copy(node, lambda old: mapped[old])
    copy.meta = {}
    return copy


def _activation(chain: _Chain, result: fx.Node) -> tuple[int, Rowwise | None]:
    """With two ups, (index of the gate, the factor that went through the activation): ``act(gate)`` in ``act(gate) * up``.

    Nothing may come between the product and down: where the factor is zero, so must be what down reads.
    """
    if len(chain.leaves) != 2:
        return 0, None
    depends: dict[fx.Node, set[int]] = {leaf: {i} for i, leaf in enumerate(chain.leaves)}
    nonlinear: dict[fx.Node, bool] = dict.fromkeys(chain.leaves, False)
    for position, node in enumerate(chain.nodes):
        sources = [source for source in node.all_input_nodes if source in depends]
        depends[node] = set().union(*(depends[source] for source in sources)) if sources else set()
        bends = is_pointwise(node) and not is_row_view(node) and op_name(node) not in SCALINGS
        nonlinear[node] = bends or any(nonlinear[source] for source in sources)
        if node is row_source(result) and op_name(node) == "mul" and len(sources) == 2 and depends[node] == {0, 1}:
            for factor, other in (sources, sources[::-1]):
                if nonlinear[factor] and not nonlinear[other] and len(depends[factor]) == len(depends[other]) == 1:
                    (gate,) = depends[factor]
                    needed = [before for before in chain.nodes[:position] if depends.get(before) == {gate}]
                    return gate, chain.extract(needed, [chain.leaves[gate]], factor)
    return 0, None
