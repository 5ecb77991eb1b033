"""Make Dynamo recompile when a graph would run with other weights or another plan.

In: the graph inputs of the weights a rewrite depends on. Out: guards in the compile that is in progress.
Why: Dynamo inlines modules, so one graph may serve every layer of a model compiled in pieces (graph breaks, or
``layer.compile()``), with the layer's weights as inputs. A rewrite bakes in the factors of one layer, so the weight's
identity, and the attachment found on it, become part of what the compiled code is valid for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn
from torch._dynamo.source import AttrSource
from torch._guards import TracingContext

from rana_fx.graph.real_values import local, root_of, source_of

ATTRIBUTE = "_rana_fx"  # where an attachment sits on a Parameter


def guard_weights(nodes: Iterable[fx.Node], *, attachment: bool) -> None:
    """Guard on the identity of each weight and of its owner, and (``attachment``) on the attachment it carries."""
    from torch._dynamo.guards import GuardBuilder, install_guard

    if TracingContext.try_get() is None:  # called on a plain GraphModule, outside of a compile
        return
    roots: set[Any] = set()
    for node in nodes:
        source = source_of(node)
        if source is None:
            continue
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))
        if attachment:
            install_guard(AttrSource(source, ATTRIBUTE).make_guard(GuardBuilder.ID_MATCH))
        roots.add(root_of(source))
    for root in roots:
        # an id-matched root makes Dynamo count its recompile limit per module instead of per function
        if isinstance(local(root), nn.Module):
            install_guard(root.make_guard(GuardBuilder.ID_MATCH))
