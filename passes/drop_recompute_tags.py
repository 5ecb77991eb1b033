"""Remove the recompute tags of gradient checkpointing from a graph without a backward pass.

In: a rewritten graph in which the nodes of checkpointed regions, or of sums of a weight and its LoRA, have recompute tags
(rana_fx/graph/checkpoint_regions.py, rewrite_lora.py). Out: the same graph, without the tags if no gradient reaches an output:
a call under ``torch.no_grad()``, or a model without trained Parameters. Nothing is recomputed then, and PyTorch rejects tagged
operations that draw random numbers, attention included, in graphs without a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.effects import written
from rana_fx.graph.functionalize import Writes
from rana_fx.graph.names import attribute_at
from rana_fx.graph.ops import is_call, op_name
from rana_fx.passes.base import PassResult, PreGrad

_TAGS = ("recompute", "ac_graph_id")
_STOPS = frozenset({"detach", "detach_"})
_BACKWARD = frozenset({"grad", "backward", "_vjp", "vjp"})  # torch.autograd.grad and the like, traced into the graph


def drop_recompute_tags(graph_module: fx.GraphModule, context: PreGrad) -> PassResult:
    """Counts the nodes whose tags are removed."""
    tagged = [node for node in graph_module.graph.nodes if "recompute" in node.meta]
    if not tagged or has_backward(graph_module, context.example_inputs):
        return PassResult()
    for node in tagged:
        for tag in _TAGS:
            node.meta.pop(tag, None)
    return PassResult(len(tagged))


def has_backward(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> bool:
    """Whether gradients may flow from an output, or from an input that is written, to anything that requires them.

    Decided by the edges of the graph and the grad mode. Conservative: operations not known to stop gradients propagate them.
    """
    given = iter(example_inputs)
    enabled = torch.is_grad_enabled()
    flowing: set[fx.Node] = set()
    seen: list[fx.Node] = []
    writes = Writes()
    for node in graph_module.graph.nodes:
        writes.add(node)
        sources = [source for source in node.all_input_nodes if source in flowing]
        if node.op == "placeholder":
            value = next(given, None)
            flows = _requires_grad(value) or _requires_grad(value_of(node))
        elif node.op == "get_attr":
            flows = _requires_grad(attribute_at(graph_module, node.target))
        elif node.op == "output":
            return bool(sources)
        elif node.target is torch._C._set_grad_enabled:
            enabled, flows = bool(node.args[0]), False
        elif is_call(node) and op_name(node) in _BACKWARD:
            return True
        else:
            flows = enabled and bool(sources) and _differentiable(node)
        if flows:
            flowing.add(node)
            for target in written(node):
                shared = {other for other in seen if writes.shares(other, target)}
                flowing |= shared
                if any(other.op == "placeholder" for other in shared):
                    return True
        seen.append(node)
    return False


def _differentiable(node: fx.Node) -> bool:
    value = value_of(node)
    integers = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    return not integers and op_name(node) not in _STOPS


def _requires_grad(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
