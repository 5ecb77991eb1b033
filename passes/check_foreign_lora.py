"""Refuse LoRA modules that were attached in parallel to a linear which the plan masks or replaces.

    y = linear(x, w) + linear(linear(dropout(x), a), b) * s     w in the plan, a and b added after it was attached

In: what a plan matched in a graph. Out: an error that names the linear. Such an addition (by ``peft.get_peft_model``) would
bypass the mask and be lost when it is merged. In parallel to linears that stayed dense it is valid.
"""

from __future__ import annotations

from torch import fx

from rana_fx.errors import LoraBeside
from rana_fx.graph.dataflow import is_row_view, tensor_inputs, walk
from rana_fx.graph.linears import Linear, source_name
from rana_fx.graph.ops import is_call, is_pointwise, op_name
from rana_fx.passes.base import PassResult, PreGrad
from rana_fx.runtime.attachment import attachment_of


def check_foreign_lora(_: fx.GraphModule, context: PreGrad) -> PassResult:
    """Raises LoraBeside for the first linear of the plan to which a LoRA module is added."""
    matches = context.matches
    # an attachment is marked on every Parameter the model had
    foreign = {linear.node: linear for linear in matches.scan.linears if attachment_of(linear.weight) is None}
    if foreign and matches.attachments:
        for linear in (linear for match in matches.found for linear in match.linears):
            added = _added(linear, foreign)
            if added is not None and attachment_of(linear.weight) is not None:
                raise LoraBeside(site=linear.name, weight=source_name(added.weight_node))
    return PassResult()


def _added(linear: Linear, foreign: dict[fx.Node, Linear]) -> Linear | None:
    """A linear of ``foreign`` whose result is added to that of ``linear``, or None."""
    for total in linear.node.users:
        if op_name(total) != "add":
            continue
        added = (node for node in tensor_inputs(total) if node is not linear.node)
        for node in walk(added, lambda node: tensor_inputs(node) if _propagates(node) else ()):
            if node in foreign:
                return foreign[node]
    return None


def _propagates(node: fx.Node) -> bool:
    return is_call(node) and (is_pointwise(node) or is_row_view(node)) and op_name(node) != "add"
