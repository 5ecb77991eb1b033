"""In-place writes, inferred from the memory effects of calls: which version of a tensor each node reads.

    h = linear(x, w); h.relu_(); y = linear(h, v)      becomes      h = linear(x, w); r = h.relu_(); y = linear(r, v)
    torch.mul(a, b, out=h); y = linear(h, v)           becomes      m = mul(a, b); h.copy_(m); y = linear(m, v)

In: a Dynamo graph, whose tensors may be written in place. Out: a graph in which later uses of a written tensor read
the node that wrote it (``redirect``), and, for views that cannot be replaced, the last write before a use (``Writes``),
so that two linears between which a tensor changes are never treated as readers of the same values. ``hidden_edges`` are
dependencies through memory that no argument of a node expresses. Writes are inferred from schemas (rana_fx.graph.effects).
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from rana_fx.graph.dataflow import is_row_view, statically_equal, value_of
from rana_fx.graph.effects import effect_of, tensors_of, written
from rana_fx.graph.fake_values import fake_run
from rana_fx.graph.ops import is_call, op_name
from rana_fx.graph.record import VALUES
from rana_fx.graph.transforms import unwrapped

__all__ = ["Writes", "hidden_edges", "redirect", "separate_outputs", "written"]


def separate_outputs(graph_module: fx.GraphModule) -> int:
    """Split a call with ``out=`` into the call without it and a ``copy_`` into the tensor; returns the number of calls split.

    Calls whose result has another shape or dtype than the tensor, and calls with several outputs, are left unchanged.
    """
    changed = 0
    for node in list(graph_module.graph.nodes):
        target = node.kwargs.get("out") if is_call(node) else None
        if not isinstance(target, fx.Node) or not isinstance(value_of(target), Tensor):
            continue
        with graph_module.graph.inserting_before(node):
            given = {key: value for key, value in node.kwargs.items() if key != "out"}
            made = graph_module.graph.create_node(node.op, node.target, node.args, given)
            copy = graph_module.graph.call_method("copy_", (target, made))
        made.meta = {key: value for key, value in node.meta.items() if key not in VALUES}
        made.meta["example_value"] = _value(made)
        if not _alike(made, target, strides=False):
            graph_module.graph.erase_node(copy)
            graph_module.graph.erase_node(made)
            continue
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy)
        graph_module.graph.erase_node(node)
        changed += 1
    if changed:
        graph_module.recompile()
    return changed


def _value(node: fx.Node) -> object:
    """The fake value of a new node, or None where the node cannot run on fake tensors."""
    try:
        return fake_run(node)
    except Exception:  # a call that needs ``out``
        return None


def _alike(one: fx.Node, other: fx.Node, *, strides: bool) -> bool:
    """Whether two nodes yield tensors of equal shape, dtype and device and, with ``strides``, of equal strides."""
    first, second = value_of(one), value_of(other)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    if first.dtype != second.dtype or first.device != second.device or first.dim() != second.dim():
        return False
    pairs = list(zip(first.shape, second.shape, strict=True))
    pairs += zip(first.stride(), second.stride(), strict=True) if strides else ()
    return all(statically_equal(a, b) for a, b in pairs)


def redirect(graph_module: fx.GraphModule) -> int:
    """Make uses of a tensor after a write read the writing node, which returns the same tensor; returns the number of uses.

    Where the write is a ``copy_`` of another tensor, nodes that only read it read that other tensor, while neither changes.
    """
    position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    # ``x.set_(y)`` changes the storage of x, of which fake values hold only the final one: its uses stay, ``Writes`` handles them
    moved = {node.args[0] for node in position if is_call(node) and op_name(node) == "set" and node.args}
    changed = 0
    for node in graph_module.graph.nodes:
        effect, sources = effect_of(node), node.all_input_nodes
        for place in effect.writes & effect.aliases:
            target = sources[place]
            if target in moved or not _same_tensor(node, target):
                continue
            for user in list(target.users):
                if position[user] > position[node]:
                    user.replace_input_with(target, node)
                    changed += 1
    changed += _read_what_was_copied(graph_module.graph)
    if changed:
        graph_module.recompile()
    return changed


def _same_tensor(node: fx.Node, target: fx.Node) -> bool:
    """Whether a node that writes into ``target`` and returns an alias of it returns all of it."""
    return _alike(node, target, strides=True) and statically_equal(_offset(node), _offset(target))


def _offset(node: fx.Node) -> object:
    value = value_of(node)
    return value.storage_offset() if isinstance(value, Tensor) else None


def _read_what_was_copied(graph: fx.Graph) -> int:
    if not graph.find_nodes(op="call_method", target="copy_"):
        return 0
    copies: dict[fx.Node, fx.Node] = {}  # ``c = t.copy_(s)`` -> s, while both hold the same values
    writes, changed = Writes(), 0
    for node in graph.nodes:
        writes.add(node)
        effect, sources = effect_of(node), node.all_input_nodes
        for place, source in enumerate(sources):
            if source in copies and is_call(node) and place not in effect.writes | effect.aliases:
                node.replace_input_with(source, copies[source])
                changed += 1
        targets = [sources[place] for place in effect.writes]
        copies = {
            copy: source
            for copy, source in copies.items()
            if not any(writes.shares(target, held) for target in targets for held in (copy, source))
        }
        if node.op == "call_method" and node.target == "copy_" and len(node.args) > 1:
            source = node.args[1]
            if isinstance(source, fx.Node) and _alike(node, source, strides=True) and not writes.shares(node, source):
                copies[node] = source
    return changed


class Writes:
    """The last write into the memory of each tensor, views included, while a graph is traversed in order."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}  # union-find over pieces of memory that are the same
        self._last: dict[Hashable, tuple[int, fx.Node]] = {}
        self._made: dict[fx.Node, int] = {}
        self._copied: dict[fx.Node, Hashable] = {}  # a copy of rows -> the version of what it copied
        self._clock = itertools.count()

    def add(self, node: fx.Node) -> None:
        """Process the next node of the graph."""
        now = self._made[node] = next(self._clock)
        effect, sources = effect_of(node), node.all_input_nodes
        for place in effect.aliases:
            self._join(node, sources[place])
        for place in effect.writes:
            for root in self._roots(sources[place]):
                self._last[root] = now, node
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and is_row_view(node) and not self.shares(node, source):
            self._copied[node] = self.version(source)

    def shares(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two nodes may share memory."""
        return bool(self._roots(one) & self._roots(other))

    def last(self, node: fx.Node) -> fx.Node | None:
        """The node that last wrote into the memory of ``node``, so far."""
        found = self._latest(node)
        return None if found is None else found[1]

    def unseen(self, node: fx.Node) -> fx.Node | None:
        """The node that last wrote into the memory of ``node`` after ``node`` was made."""
        found = self._latest(node)
        return None if found is None or found[0] <= self._made.get(node, -1) else found[1]

    def version(self, node: fx.Node) -> Hashable:
        """A key of the current values of ``node``, which changes with each write; None where nothing was written."""
        source = node.args[0] if node.args else None
        if node in self._copied:
            last = self.last(node)
            return self._copied[node] if last is None else (last, self._copied[node])
        if is_row_view(node) and isinstance(source, fx.Node) and self.last(node) is self.last(source):
            return self.version(source)
        return self.last(node)

    def _latest(self, node: fx.Node) -> tuple[int, fx.Node] | None:
        times = [self._last[root] for root in self._roots(node) if root in self._last]
        return max(times, key=lambda found: found[0], default=None)

    def _join(self, node: fx.Node, source: fx.Node) -> None:
        """Record that two nodes share memory, also where their fake values, which were made separately, do not."""
        mine, others = self._roots(node), self._roots(source)
        if mine & others:
            return
        for root in mine:
            for other in others:
                one, another = self._root(root), self._root(other)
                if type(one) is not type(another) or one != another:  # a node and a storage are not comparable
                    self._parent[one] = another

    def _roots(self, node: fx.Node) -> set[Hashable]:
        return {self._root(cell) for cell in _cells(node)}

    def _root(self, cell: Hashable) -> Hashable:
        while cell in self._parent:
            cell = self._parent[cell]
        return cell


def _cells(node: fx.Node) -> Iterable[Hashable]:
    """The storages of the value of a node; the node itself where it has no value."""
    value = value_of(node)
    if value is None:
        return (node,)
    tensors = [unwrapped(leaf) for leaf in tensors_of(value)]
    if all(leaf.layout is torch.strided and torch._C._has_storage(leaf) for leaf in tensors):
        return [StorageWeakRef(leaf.untyped_storage()) for leaf in tensors]
    return (node,)


def hidden_edges(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Writing node -> later nodes that read the written memory through another alias."""
    writes = Writes()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last = writes.unseen(source)
            if last is not None:
                found.setdefault(last, []).append(node)
        writes.add(node)
    return found
