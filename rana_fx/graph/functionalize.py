"""In-place writes, inferred from dataflow: which value a node reads when memory changes under it.

    h = linear(x, w); h.relu_(); y = linear(h, v)      becomes      h = linear(x, w); r = h.relu_(); y = linear(r, v)

In: a Dynamo graph, whose tensors may be written in place. Out: a graph in which later uses of a written tensor name
the node that wrote it (``redirect``), and for views that cannot be renamed, the last write before a use (``Writes``),
so that two linears are never taken to read one tensor when it changed between them. ``hidden_edges`` are the uses of
written memory that no argument shows.
"""

from __future__ import annotations

from torch import Tensor, fx

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.ops import VIEWS, is_call, op_name, writes_first


def written(node: fx.Node) -> fx.Node | None:
    """The tensor a node writes into, if it writes."""
    target = node.args[0] if writes_first(node) else None
    return target if isinstance(target, fx.Node) and isinstance(value_of(target), Tensor) else None


def redirect(graph_module: fx.GraphModule) -> int:
    """Make uses of a tensor after a write into it read the writing node, which returns the same tensor; returns how many."""
    position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    changed = 0
    for node in graph_module.graph.nodes:
        target = written(node)
        if target is None or not isinstance(value_of(node), Tensor):
            continue
        for user in list(target.users):
            if position[user] > position[node]:
                user.replace_input_with(target, node)
                changed += 1
    if changed:
        graph_module.recompile()
    return changed


class Writes:
    """The last write into each tensor's memory, views included, while a graph is walked in order."""

    def __init__(self) -> None:
        self._root: dict[fx.Node, fx.Node] = {}
        self._last: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        """The next node of the graph."""
        target = written(node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if target is not None:
            self._root[node] = self.root(target)
            self._last[self.root(target)] = node
        elif source is not None and _is_view(node, source):
            self._root[node] = self.root(source)

    def root(self, node: fx.Node) -> fx.Node:
        """The tensor whose memory a node shares, at most."""
        return self._root.get(node, node)

    def last(self, node: fx.Node) -> fx.Node | None:
        """The node that last wrote into the memory of ``node``, so far."""
        return self._last.get(self.root(node))


def _is_view(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node may share the memory of ``source``. Indexing by a tensor copies."""
    if not is_call(node) or op_name(node) not in VIEWS:
        return False
    others = (value_of(other) for other in node.all_input_nodes if other is not source)
    return op_name(node) != "getitem" or not any(isinstance(value, Tensor) for value in others)


def hidden_edges(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Writing node -> later nodes that read what it wrote through another name of the same memory."""
    writes = Writes()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last = writes.last(source)
            if last is not None and last is not source:
                found.setdefault(last, []).append(node)
        writes.add(node)
    return found
