"""Writes into tensors, told from dataflow: which value a node reads when memory changes under it.

    h = linear(x, w); h.relu_(); y = linear(h, v)      becomes      h = linear(x, w); r = h.relu_(); y = linear(r, v)

In: a Dynamo graph, whose tensors may be written in place. Out: a graph in which later uses of a written tensor name
the node that wrote it (``redirect``), and for views that cannot be renamed, the last write before a use (``Writes``),
so that two linears are never taken to read one tensor when it changed between them. ``hidden_edges`` are the uses of
written memory that no argument shows.
"""

from __future__ import annotations

from torch import Tensor, fx

from rana_fx.graph.dataflow import op_name, value_of

_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift",
    "setitem",
}  # fmt: skip
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "expand", "view_as", "reshape_as",
    "transpose", "permute", "swapaxes", "swapdims", "movedim", "t", "T", "mT", "chunk", "split", "tensor_split",
    "split_with_sizes", "unbind", "narrow", "getitem", "slice", "select", "detach", "alias", "contiguous", "to", "identity",
    "dropout",
}  # fmt: skip


def written(node: fx.Node) -> fx.Node | None:
    """The tensor a node writes into, if it writes."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_method":
        raw = str(node.target)
    elif isinstance(node.target, str):
        raw = node.target
    else:
        raw = getattr(node.target, "__name__", "")
    raw = raw.strip("_") if raw.startswith("__") else raw
    if raw in _OPERATORS or (raw.endswith("_") and raw != "requires_grad_") or node.kwargs.get("inplace") is True:
        return node.args[0] if isinstance(value_of(node.args[0]), Tensor) else None
    return None


def redirect(graph_module: fx.GraphModule) -> int:
    """Let uses of a tensor after a write to it name the writing node, which returns the same tensor; returns how many."""
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
    """Follows a graph in order and remembers the last write into each tensor's memory, views included."""

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
        """What last wrote into the memory of ``node``, so far."""
        return self._last.get(self.root(node))


def _is_view(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node may share the memory of ``source``. Indexing by a tensor copies."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in _VIEWS:
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
