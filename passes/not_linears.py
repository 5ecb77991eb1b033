"""Uses of planned weights in a graph that are not linears: other matmuls, and operators whose contents are not analysed.

In: a Dynamo graph, its linears and the plans on its weights. Out: each such use, by the name of its linear, with the reason why
it is computed by the original weight: a skip of rana_fx/graph/linears.py; a region of a higher-order operator (``torch.cond``, an
autograd function) with the weight as an operand; an operator of another library. Reads of a weight without a product, such as
its norm in a loss, are not reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from rana_fx.graph.dataflow import walk
from rana_fx.graph.graph_pass import Declined
from rana_fx.graph.linears import Scan
from rana_fx.graph.operands import base_name
from rana_fx.graph.ops import CASTS, MOVEMENT, is_call, op_name
from rana_fx.runtime.attachment import Attachment

_KNOWN = ("aten", "prim", "prims", "rana")


def not_linears(graph: fx.Graph, scan: Scan, attachments: Sequence[Attachment]) -> list[Declined]:
    """Planned weights that are multiplied by a node other than a linear, each with the reason."""
    planned = {base_name(site) for attachment in attachments for adapter in attachment.plan.adapters for site in adapter.sites}
    names = {key: name for attachment in attachments for key, name in attachment.names.items()}
    found = [Declined(skip.site, f"{skip.reason}: it runs dense") for skip in scan.skips if base_name(skip.site) in planned]
    known = {place.where for place in found}
    for node, weight in scan.weights.items():
        name = names.get(id(weight))
        if name in planned - known:
            for user in walk(node.users, lambda user: user.users if _shows(user) else ()):
                kind = _closed(user)
                if kind is not None:
                    found.append(Declined(str(name), f"it is inside {kind}, where linears are not looked for: it runs dense"))
    return list(dict.fromkeys(found))


def _shows(user: fx.Node) -> bool:
    """Whether the result of a node has the values of the weight: movement and casts."""
    return is_call(user) and op_name(user) in MOVEMENT | CASTS


def _closed(user: fx.Node) -> str | None:
    """Description of a node whose use of its operands is not analysed; None for other nodes."""
    target = user.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"a region ({target.name()})"
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = target.default if "default" in target.overloads() else getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload) and target.namespace not in _KNOWN:
        return f"an operator of another library ({target.name()})"
    return None
