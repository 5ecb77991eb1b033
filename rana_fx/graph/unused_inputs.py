"""Inputs of a graph that a rewrite leaves without users: weights in whose place factors are read.

In: a Dynamo graph after its rewrite, and its inputs. Out: the graph without them, and the positions of those that stay. Dynamo
reads the graph's placeholders again after compilation, and then neither looks these weights up in their modules at every call nor
passes them; a caller that goes by the graph as it was (DistributedDataParallel's) passes all, of which ``taking`` selects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn


def remove_unused_weights(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> list[int]:
    """Erase placeholders of Parameters that nothing reads. Returns the positions of all others in ``example_inputs``."""
    places = graph_module.graph.find_nodes(op="placeholder")
    if len(places) != len(example_inputs):
        return list(range(len(example_inputs)))
    stay = [i for i, node in enumerate(places) if node.users or not isinstance(example_inputs[i], nn.Parameter)]
    for i in set(range(len(places))) - set(stay):
        graph_module.graph.erase_node(places[i])
    if len(stay) < len(places):
        graph_module.recompile()
    return stay


def taking(compiled: Callable[..., Any], stay: list[int], count: int) -> Callable[..., Any]:
    """``compiled``, which takes the inputs at the positions ``stay``, as a function of these, or of all ``count``."""
    if len(stay) == count:
        return compiled

    def run(*args: Any) -> Any:
        return compiled(*args) if len(args) != count else compiled(*(args[i] for i in stay))

    return run
