"""The contexts that passes take besides a graph, and the protocol they follow (``Pass``, rana_fx.graph.graph_pass).

    def my_pass(graph_module, context) -> PassResult: ...        one file, and one line in a tuple of passes/__init__.py

In: a graph module, changed in place, and the context of the tuple that the pass is in: the graph's inputs (``NORMALIZE``), what
the plan matched (``PRE_GRAD``), the devices that have kernels for fused operations (``POST_GRAD``). Out: a ``PassResult``: how
many places were changed, and the places that were declined with the reason. A pass neither times itself nor writes dumps nor
verifies: the runner does. New nodes carry true fake values: ``passes/emit.py`` and ``passes/fusible.py`` compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from rana_fx.graph.graph_pass import Declined, Pass, PassResult
from rana_fx.passes.match import Match, Matches

__all__ = ["Declined", "EachMatch", "Pass", "PassResult", "PostGrad", "PreGrad"]


@dataclass(frozen=True, eq=False)
class PreGrad:
    """Context of passes over a Dynamo graph: its inputs, and what the plan matched in it before the first of them."""

    example_inputs: Sequence[object]
    matches: Matches


@dataclass(frozen=True)
class PostGrad:
    """Context of passes over Inductor's graph.

    devices: types of device to fuse on; None: those for which the registry has lowerings of fused operations.
    """

    devices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class EachMatch:
    """A pass that applies a rewrite to every match. It replaces all linears of the match, or none where another rewrite does.

    rewrite: (graph module, match) -> number of linears it replaced.
    """

    rewrite: Callable[[fx.GraphModule, Match], int]

    @property
    def __name__(self) -> str:
        return self.rewrite.__name__

    def __call__(self, graph_module: fx.GraphModule, context: PreGrad) -> PassResult:
        count = 0
        for match in context.matches.found:
            replaced = self.rewrite(graph_module, match)
            assert replaced in (0, len(match.linears)), f"{replaced} of {len(match.linears)} linears of {match.adapter.name}"
            count += replaced
        return PassResult(count)
