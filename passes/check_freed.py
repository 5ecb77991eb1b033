"""Weights that a rewritten graph no longer reads, and weights that are gone.

In: a rewritten graph and what was matched in it. Out: the Parameters whose memory may be freed; or an error where the graph
reads one that was.
"""

from __future__ import annotations

from torch import fx, nn

from rana_fx.dense_memory import is_freed
from rana_fx.errors import WeightsFreed
from rana_fx.graph.linears import source_name
from rana_fx.graph.operands import base_name
from rana_fx.graph.ops import MOVEMENT, op_name
from rana_fx.passes.match import Match, Matches


def superfluous(matches: Matches) -> list[nn.Parameter]:
    """Weights that factors have replaced here and wherever else the plan knows them, and that share memory with nothing."""
    found: dict[int, nn.Parameter] = {}
    for match in matches.found:
        for linear in match.linears:
            alone = id(linear.weight) in match.attachment.unshared
            if alone and not is_freed(linear.weight) and _unread(linear.weight_node) and _replaced(match, base_name(linear.name)):
                found[id(linear.weight)] = linear.weight
    return list(found.values())


def check_present(matches: Matches) -> None:
    """Raises WeightsFreed where the graph reads a weight that is gone."""
    names = {key: name for attachment in matches.attachments for key, name in attachment.names.items()}
    for node, weight in matches.scan.weights.items():
        if is_freed(weight) and not _unread(node):
            raise WeightsFreed(site=names.get(id(weight)) or source_name(node), what="compile it otherwise")


def _unread(node: fx.Node) -> bool:
    """Whether nothing but views that nobody reads is left of a node."""
    return all(op_name(user) in MOVEMENT and _unread(user) for user in node.users)


def _replaced(match: Match, weight: str) -> bool:
    """Whether every linear of a weight, also those in other graphs, has an adapter that brings its own and reads no other."""
    plan = match.attachment.plan
    sites = {record.name for record in plan.sites if base_name(record.name) == weight}
    own = {site for adapter in plan.adapters if not adapter.reads_model for site in adapter.sites}
    return sites <= own and not any(base_name(skip.site) == weight for skip in plan.skips)
