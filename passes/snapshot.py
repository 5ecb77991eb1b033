"""The state of a graph at one time, to detect what a pass added, changed or removed.

In: a graph, before and after a pass. Out: the nodes that are new, and those whose operation, inputs or fake value were replaced.
Nothing is copied: FX and the passes replace arguments and values and never change them in place, so identity is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rana_fx.graph.dataflow import value_of


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Operation, arguments and fake value of each node, in the graph's order."""

    nodes: dict[fx.Node, tuple[object, ...]]

    @classmethod
    def of(cls, graph: fx.Graph) -> Snapshot:
        return cls({node: (node.target, node.args, node.kwargs, value_of(node)) for node in graph.nodes})

    def added(self, before: Snapshot) -> list[fx.Node]:
        """Nodes that were not there before."""
        return [node for node in self.nodes if node not in before.nodes]

    def changed(self, before: Snapshot) -> list[fx.Node]:
        """Nodes that were there before, and differ."""
        return [node for node, facts in self.nodes.items() if node in before.nodes and _differ(facts, before.nodes[node])]

    def equals(self, before: Snapshot) -> bool:
        """Whether no node was added, removed, changed or moved."""
        return list(self.nodes) == list(before.nodes) and not self.changed(before)


def _differ(facts: tuple[object, ...], before: tuple[object, ...]) -> bool:
    return any(one is not other for one, other in zip(facts, before, strict=True))
