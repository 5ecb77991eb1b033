"""Inline regions that hold linears: graphs that a higher-order operator calls exactly once.

    y = autograd_function_apply(forward, backward, x, w)[0]        becomes        the nodes of forward
    y = invoke_subgraph(body, "0", x, w)[0], wrap(body, x, w)      becomes        the nodes of body

In: a Dynamo graph and its Parameters. Out: one flat graph. A region is inlined if one of its operands is a weight of at least
two dimensions and its body contains a product; other regions are left unchanged. Bodies that do not run exactly once (cond,
while_loop, scan, map) stay; linears in them are reported (rana_fx.graph.unadapted).

Where gradients flow, an ``autograd.Function`` is traced as a higher-order operator. Its backward pass computes gradients of the
dense linears, and none of the factors of the adapters that replace them. Autograd therefore differentiates the inlined forward
pass instead. This is correct where the Function's backward pass is the derivative of its forward pass (a specialised kernel,
less memory), and incorrect where it differs on purpose (a straight-through estimator, reversed or clipped gradients). Both are
computed and compared (rana_fx.graph.derivatives). Inputs that get no gradient from the Function's backward pass get none from
the inlined forward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx.graph.checkpoint_regions import open_checkpoints
from rana_fx.graph.dataflow import value_of
from rana_fx.graph.derivatives import Unlike, undifferentiated
from rana_fx.graph.effects import bodies_of, effect_of, multiplies
from rana_fx.graph.fake_values import fake_run
from rana_fx.graph.graph_pass import Declined, PassResult
from rana_fx.graph.inline import inline_body, replace_items
from rana_fx.graph.operands import Operand, operand

_FUNCTION = "autograd_function_apply"


def open_regions(graph_module: fx.GraphModule, weights: Mapping[fx.Node, nn.Parameter]) -> PassResult:
    """Inline every region that holds linears, nested regions included; declines regions that cannot be inlined."""
    opened, declined = 0, dict[fx.Node, str]()
    changed = True
    while changed:
        changed = False
        for node in list(graph_module.graph.nodes):
            if node in declined or not _holds_linears(node, weights):
                continue
            reason = _open(node, _operands(node))
            if reason is None:
                opened, changed = opened + 1, True
            else:
                declined[node] = reason
        if changed:
            opened += open_checkpoints(graph_module)  # checkpoint regions inside the inlined bodies
    if opened:
        graph_module.graph.lint()
        graph_module.recompile()
    return PassResult(opened, tuple(Declined(node.name, reason) for node, reason in declined.items()))


def _operands(node: fx.Node) -> list[Any] | None:
    """Operands of the first body, where the operator calls it once with the operator's own arguments; else None."""
    name = getattr(node.target, "__name__", "")
    if not bodies_of(node):
        return None
    if name == _FUNCTION:
        return list(node.args[2:])
    return list(node.args[2:]) if name == "invoke_subgraph" else list(node.args[1:]) if name == "wrap" else None


def _holds_linears(node: fx.Node, weights: Mapping[fx.Node, nn.Parameter]) -> bool:
    operands = _operands(node)
    if operands is None or not any(_is_matrix(source, weights) for source in node.all_input_nodes):
        return False
    return any(multiplies(inner) for inner in bodies_of(node)[0][1].graph.nodes)


def _is_matrix(source: fx.Node, weights: Mapping[fx.Node, nn.Parameter]) -> bool:
    """Whether it is a Parameter of more than one dimension, or shows one (Dynamo computes ``w.T`` outside of the region)."""
    shown = operand(source, weights)
    return isinstance(shown, Operand) and shown.value.dim() > 1 or source in weights and weights[source].dim() > 1


def _open(node: fx.Node, operands: Sequence[Any] | None) -> str | None:
    """Inline a region and return None, or return the reason why it cannot be inlined."""
    if operands is None or any(user.target is not operator.getitem for user in node.users):
        return "its results are read as a whole"
    reference, body = bodies_of(node)[0]
    if getattr(node.target, "__name__", "") == _FUNCTION:
        return _open_function(node, operands)
    _, results = inline_body(node, reference, body, operands)
    replace_items(node, results)
    return None


def _open_function(node: fx.Node, operands: Sequence[Any]) -> str | None:
    (reference, forward), (_, backward) = bodies_of(node)
    switches = [inner for inner in forward.graph.nodes if inner.target is torch._C._set_grad_enabled]
    if "saved_for_backward_idx" not in node.kwargs or node.kwargs.get("dirty_idx") or effect_of(node).writes:
        return "an autograd.Function that writes its inputs"
    if [inner.args[0] for inner in switches] != [False, True]:
        return "an autograd.Function that switches gradients itself"
    try:
        constant = undifferentiated(node, forward, backward, switches)
    except Unlike as unlike:
        return f"an autograd.Function {unlike}"
    with node.graph.inserting_before(node):
        given = [
            _detached(operand) if place in constant and isinstance(value_of(operand), Tensor) else operand
            for place, operand in enumerate(operands)
        ]
    made, (results, _) = inline_body(node, reference, forward, given, switches)
    for inner in made:
        _settle(inner, node)
    unwanted: Any = node.kwargs["non_differentiable_idx"]
    with node.graph.inserting_before(node):
        results = [_detached(result) if place in unwanted else result for place, result in enumerate(results)]
    replace_items(node, results)
    return None


def _settle(inner: fx.Node, node: fx.Node) -> None:
    """Recompute the fake value with gradients enabled, which the region was traced without; copy recompute tags of the call."""
    for key in ("recompute", "ac_graph_id"):
        if key in node.meta:
            inner.meta.setdefault(key, node.meta[key])
    if inner.op in ("call_function", "call_method") and value_of(inner) is not None:
        with torch.enable_grad():
            inner.meta["example_value"] = fake_run(inner)


def _detached(source: fx.Node) -> fx.Node:
    made = source.graph.call_method("detach", (source,))
    made.meta["example_value"] = fake_run(made)
    return made
