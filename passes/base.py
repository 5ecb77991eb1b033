"""The contexts that passes take besides a graph, and the protocol they follow (``Pass``, rana_fx.graph.graph_pass).

    def my_pass(graph_module, context) -> PassResult: ...        one file, and one line in a tuple of passes/__init__.py

In: a graph module, changed in place, and the context of the tuple that the pass is in: the graph's inputs (``NORMALIZE``), what
the plan matched (``PRE_GRAD``), the devices that have kernels for fused operations (``POST_GRAD``). Out: a ``PassResult``: how
many places were changed, and the places that were declined with the reason. A pass neither times itself nor writes dumps nor
verifies: the runner does. New nodes carry true fake values: ``passes/emit.py`` and ``passes/fusible.py`` compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx

from rana_fx.graph.graph_pass import Declined, Intended, Pass, PassResult
from rana_fx.passes.match import Match, Matches

__all__ = ["Declined", "EachMatch", "Intended", "Pass", "PassResult", "PostGrad", "PreGrad"]


@dataclass(frozen=True, eq=False)
class PreGrad:
    """Context of passes over a Dynamo graph: its inputs, and what the plan matched in it before the first of them.

    given: the nodes of the graph before the first pass. declined: linears that a rewrite has left, so far.
    """

    example_inputs: Sequence[object]
    matches: Matches
    given: frozenset[fx.Node] = frozenset()
    declined: list[Declined] = field(default_factory=list)


@dataclass(frozen=True)
class PostGrad:
    """Context of passes over Inductor's graph.

    devices: types of device to fuse on; None: those for which the registry has lowerings of fused operations.
    """

    devices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class EachMatch:
    """A pass that applies a rewrite to every match.

    rewrite: (graph module, match) -> how many linears it replaced, and those that it declined, by name; nothing of either where
        the match is another rewrite's.
    """

    rewrite: Callable[[fx.GraphModule, Match], PassResult]

    @property
    def __name__(self) -> str:
        return self.rewrite.__name__

    def __call__(self, graph_module: fx.GraphModule, context: PreGrad) -> PassResult:
        results = [self.rewrite(graph_module, match) for match in context.matches.found]
        declined = tuple(place for result in results for place in result.declined)
        context.declined.extend(declined)
        return PassResult(sum(result.count for result in results), declined)
