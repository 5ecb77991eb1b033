"""Make Dynamo recompile when a graph would run with other weights or another plan.

In: the graph inputs of the weights a rewrite depends on. Out: guards in the compile that is in progress.
Why: Dynamo inlines modules, so one graph may serve every layer of a model compiled in pieces (graph breaks, or
``layer.compile()``), with the layer's weights as inputs. A rewrite bakes in the factors of one layer, so the weight's
identity, and the attachment found on it, become part of what the compiled code is valid for.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn
from torch._dynamo.source import AttrSource
from torch._guards import TracingContext

ATTRIBUTE = "_rana_fx"  # where an attachment sits on a Parameter


def guard_weights(nodes: Iterable[fx.Node], *, attachment: bool) -> None:
    """Guard on the identity of each weight and of its owner, and (``attachment``) on the attachment it carries."""
    from torch._dynamo.guards import GuardBuilder, install_guard

    if TracingContext.try_get() is None:  # called on a plain GraphModule, outside of a compile
        return
    roots = set()
    for node in nodes:
        source = getattr(node, "_dynamo_source", None)
        if source is None:
            continue
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))
        if attachment:
            install_guard(AttrSource(source, ATTRIBUTE).make_guard(GuardBuilder.ID_MATCH))
        while getattr(source, "base", None) is not None:
            source = source.base
        roots.add(source)
    for root in roots:
        # an id-matched root makes Dynamo count its recompile limit per module instead of per function
        if isinstance(_value(root), nn.Module):
            install_guard(root.make_guard(GuardBuilder.ID_MATCH))


def _value(source: object) -> object:
    """What a local variable of the frame that is being compiled holds, or None."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        # the frame's locals live on the translator of the outermost function
        root = InstructionTranslator.current_tx().output.root_tx
        return root.f_locals.get(getattr(source, "local_name", ""), None)
    except (AttributeError, RuntimeError):
        return None
