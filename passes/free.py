"""Free the dense weights that factors have replaced, for a model that only decodes and is short of memory.

    graph(w_q, w_k, w_v, x, ...)      becomes      graph(x, ...)

In: a rewritten Dynamo graph and its inputs. Out: the inputs that are left. Weights nobody reads any more leave the graph (Dynamo
reads its placeholders again once the backend returns, and stops passing them) and give their memory back; the Parameters
keep name, shape and dtype, so guards on them still hold in graphs that are traced later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from rana_fx.passes.match import Matches


def free_weights(graph_module: fx.GraphModule, example_inputs: Sequence[Any], matches: Matches) -> list[Any]:
    """Erase and free in place; a weight that is still read stays."""
    graph = graph_module.graph
    replaced = {
        linear.weight_node: linear.weight
        for match in matches.found
        if match.adapter.router is not None
        for linear in match.linears
        if linear.whole and linear.weight_node.op == "placeholder"
    }
    graph.eliminate_dead_code()
    kept = []
    for node, value in zip([n for n in graph.nodes if n.op == "placeholder"], example_inputs, strict=True):
        if node in replaced and not node.users:
            graph.erase_node(node)
            _free(replaced[node])
        else:
            kept.append(value)
    graph_module.recompile()
    return kept


def _free(weight: nn.Parameter) -> None:
    # a storage that was once lent to NumPy, or is mapped from a file, cannot be resized: another takes its place
    empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    empty.untyped_storage().resize_(0)
    weight.data = empty
