"""Weights that a rewritten graph no longer reads, and weights that were freed.

In: a rewritten graph and what was matched in it. Out: the Parameters whose memory may be freed; or an error where the graph
reads a freed one.
"""

from __future__ import annotations

from torch import fx, nn

from rana_fx.dense_memory import is_freed
from rana_fx.errors import WeightsFreed
from rana_fx.graph.linears import source_name
from rana_fx.graph.operands import base_name
from rana_fx.graph.ops import MOVEMENT, op_name
from rana_fx.passes.base import PassResult, PreGrad
from rana_fx.passes.match import Matches
from rana_fx.runtime.replaced_weights import replaced_weights


def check_freed(_: fx.GraphModule, context: PreGrad) -> PassResult:
    """Raises WeightsFreed where the graph reads a freed weight."""
    matches = context.matches
    names = {key: name for attachment in matches.attachments for key, name in attachment.names.items()}
    for node, weight in matches.scan.weights.items():
        if is_freed(weight) and not _unread(node):
            raise WeightsFreed(site=names.get(id(weight)) or source_name(node), what="compile it otherwise")
    return PassResult()


def weights_to_free(matches: Matches) -> list[nn.Parameter]:
    """Weights that factors replace in this graph and in all other linears of the plan, and that share memory with no tensor."""
    replaced = {attachment: replaced_weights(attachment.plan) for attachment in matches.attachments}
    found: dict[int, nn.Parameter] = {}
    for match in matches.found:
        for linear in match.linears:
            freeable = id(linear.weight) in match.attachment.unshared and base_name(linear.name) in replaced[match.attachment]
            if freeable and not is_freed(linear.weight) and _unread(linear.weight_node):
                found[id(linear.weight)] = linear.weight
    return list(found.values())


def _unread(node: fx.Node) -> bool:
    """Whether the only users of a node are views without users."""
    return all(op_name(user) in MOVEMENT and _unread(user) for user in node.users)
