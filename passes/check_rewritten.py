"""Check that no linear that the plan names is left without a reason, and that every operation that replaced one has its adapter.

In: a Dynamo graph after all rewrites of linears, and what was matched in it before. Out: an AssertionError, since the cause is a
bug of a rewrite and not a user error: for example a match that no rewrite replaced.
"""

from __future__ import annotations

import torch
from torch import fx

from rana_fx.passes.base import PassResult, PreGrad


def check_rewritten(graph_module: fx.GraphModule, context: PreGrad) -> PassResult:
    """Raises AssertionError with the linear or node."""
    present, declined = set(graph_module.graph.nodes), {place.where for place in context.declined}
    for match in context.matches.found:
        for linear in match.linears:
            assert linear.node not in present or linear.name in declined, f"{linear.name} is still in the graph"
    for node in present - context.given:  # a model may call our operations itself
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "rana":
            assert "rana" in node.meta, f"{node}: no adapter recorded"
    return PassResult()
