"""Invariants every rewritten graph must keep. A violation is a bug of ours, so it asserts.

Checked: the graph is well formed; every tensor-valued node knows its fake value (as the graph had them before); no
linear that was to be replaced is left; every ``rana::`` operation is one we declare.
"""

from __future__ import annotations

import torch
from torch import fx

from rana_fx.passes.match import Matches

_KNOWN = {"rana::masked_gemv", "rana::masked_rows", "rana::router"}


def verify(graph_module: fx.GraphModule, matches: Matches, replaced: int) -> None:
    """Raises AssertionError with the offending node."""
    graph = graph_module.graph
    graph.lint()
    planned = sum(len(match.linears) for match in matches.found)
    assert replaced == planned, f"{replaced} linears rewritten, {planned} planned"
    present = set(graph.nodes)
    for match in matches.found:
        for linear in match.linears:
            assert linear.node not in present, f"{linear.name} is still in the graph"
    for node in graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "rana":
            assert target._schema.name in _KNOWN, f"{node}: unknown operation {target}"
            assert "rana_adapter" in node.meta, f"{node}: no adapter recorded"
