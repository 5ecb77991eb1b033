"""Kinds of forward pass: the sets of graphs that ran together, in an order that does not depend on the order of batches.

In: traced graphs as they are added, and the graphs that each batch runs. Out: the graphs of every kind of forward pass, in order
of execution. A model whose branches depend on the batch (an image or none, experts with tokens) has several kinds; a kind whose
graphs are a subset of those of another kind is omitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rana_fx.graph.roles import TracedGraph


class ForwardPasses:
    """Graphs traced so far, and the kinds of forward pass made of them."""

    def __init__(self) -> None:
        self.graphs: list[TracedGraph] = []
        self._kinds: list[tuple[int, ...]] = []  # indices of graphs in order of execution
        self._running: dict[int, None] = {}

    def add(self, graph: TracedGraph) -> int:
        """Add a graph that was just traced; returns its number, the argument of ``ran``."""
        self.graphs.append(graph)
        return len(self.graphs) - 1

    def begin(self) -> None:
        """Begin a forward pass."""
        self._running = {}

    def ran(self, number: int) -> None:
        """Record that a graph runs in the current forward pass; the number of runs is not recorded."""
        self._running.setdefault(number)

    def end(self) -> tuple[bool, frozenset[str]]:
        """End the current forward pass; returns (whether its kind is new, the names of its linears)."""
        kind = tuple(self._running)
        names = frozenset(found.linear.name for number in kind for found in self.graphs[number].occurrences)
        if any(set(kind) <= set(known) for known in self._kinds):
            return False, names
        self._kinds = [known for known in self._kinds if not set(known) <= set(kind)] + [kind]
        return True, names

    def kinds(self) -> list[list[TracedGraph]]:
        """The graphs of each kind of forward pass, ordered by ``in_order``."""
        return in_order([[self.graphs[number] for number in kind] for kind in self._kinds])


def in_order(kinds: Sequence[Sequence[TracedGraph]]) -> list[list[TracedGraph]]:
    """Kinds of forward pass by decreasing number of linears, whatever the order of batches; a stable sort for equal linears."""

    def rank(graphs: Sequence[TracedGraph]) -> tuple[int, int, list[str]]:
        names = [found.linear.name for graph in graphs for found in graph.occurrences]
        return -len(set(names)), -len(names), sorted(set(names))

    return sorted(map(list, kinds), key=rank)


def spliced(known: Sequence[str], names: Iterable[str]) -> list[str]:
    """``known`` with the new elements of ``names``, each behind its predecessor in ``names``, or before the first known one."""
    places = set(known)
    behind: dict[str | None, list[str]] = {}
    last, following = None, None
    for name in names:
        if name in places:
            last, following = name, following or name
        else:
            behind.setdefault(last, []).append(name)
    first, order = behind.pop(None, []), list[str]()
    for name in known:
        if name == following:
            order += first
        order += [name, *behind.get(name, [])]
    return order if following is not None else order + first
