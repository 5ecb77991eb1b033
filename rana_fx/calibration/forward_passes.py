"""Which graphs ran together: the kinds of forward pass that calibration has seen, in an order that no order of batches decides.

In: traced graphs as they are added, and which of them each batch runs. Out: the graphs of every kind of forward pass, in order of
execution. A model whose branches depend on the batch (an image or none, experts that got tokens) has several kinds; a kind whose
graphs all run in another one, too, shows nothing more and is left out.
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
        """A graph that was just traced; returns the number that ``ran`` takes."""
        self.graphs.append(graph)
        return len(self.graphs) - 1

    def begin(self) -> None:
        """A forward pass begins."""
        self._running = {}

    def ran(self, number: int) -> None:
        """A graph runs in it; how often does not matter."""
        self._running.setdefault(number)

    def end(self) -> tuple[bool, frozenset[str]]:
        """It is over; returns whether it is of a new kind, and the names of the linears in it."""
        kind = tuple(self._running)
        names = frozenset(found.linear.name for number in kind for found in self.graphs[number].occurrences)
        if any(set(kind) <= set(known) for known in self._kinds):
            return False, names
        self._kinds = [known for known in self._kinds if not set(known) <= set(kind)] + [kind]
        return True, names

    def kinds(self) -> list[list[TracedGraph]]:
        """The graphs of each kind of forward pass, ordered as ``in_order`` does."""
        return in_order([[self.graphs[number] for number in kind] for kind in self._kinds])


def in_order(kinds: Sequence[Sequence[TracedGraph]]) -> list[list[TracedGraph]]:
    """Kinds of forward pass with most linears first, whichever batch came first; those with the same linears as they came."""

    def rank(graphs: Sequence[TracedGraph]) -> tuple[int, int, list[str]]:
        names = [found.linear.name for graph in graphs for found in graph.occurrences]
        return -len(set(names)), -len(names), sorted(set(names))

    return sorted(map(list, kinds), key=rank)


def spliced(known: Sequence[str], names: Iterable[str]) -> list[str]:
    """``known`` with the further ones of ``names``, each behind the one that it follows there, or before the first known one."""
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
