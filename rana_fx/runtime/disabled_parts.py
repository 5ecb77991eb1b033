"""Planned linears in parts of a model that ``torch.compiler.disable`` keeps out of all graphs.

In: an attachment. Out: its linears in modules whose ``forward`` is disabled, with the reason. ``adapt`` leaves such linears out
of a plan; what is disabled later, no graph and no pass sees.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rana_fx.graph.operands import base_name
from rana_fx.runtime.attachment import Attachment

REASON = "its module is under torch.compiler.disable, outside of all graphs: it runs dense"


def disabled_parts(attachment: Attachment) -> Iterator[tuple[str, str]]:
    """(linear, reason) of every planned one whose module, or a module around it, is disabled."""
    model = None if attachment.watch is None else attachment.watch.model()
    if model is None:
        return
    inside = [f"{name}." for name, module in model.named_modules() if _is_disabled(module)]
    planned = (site for adapter in attachment.plan.adapters for site in adapter.sites)
    for site in planned if inside else ():
        if any(f"{base_name(site)}.".startswith(name) for name in inside):
            yield site, REASON


def _is_disabled(module: nn.Module) -> bool:
    return bool(getattr(module.forward, "_torchdynamo_disable", False))
