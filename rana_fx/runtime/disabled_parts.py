"""Planned linears in parts of a model that no graph has: under ``torch.compiler.disable``, or behind backward hooks.

In: an attachment. Out: its linears in modules whose ``forward`` is disabled, with the reason, and those in modules of
``torch.nn`` with a backward hook: Dynamo leaves its graph for the call of such a module, and starts none in the code of
``torch.nn``. ``adapt`` leaves such linears out of a plan; what is disabled or hooked later, no graph and no pass sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from torch._dynamo import compiled_autograd, trace_rules

from rana_fx.graph.operands import base_name
from rana_fx.runtime.attachment import Attachment

REASON = "its module is under torch.compiler.disable, outside of all graphs: it runs dense"
HOOKED = "its module, or one of torch.nn around it, has a backward hook, which keeps it out of all graphs: it runs dense"


def disabled_parts(attachment: Attachment) -> Iterator[tuple[str, str]]:
    """(linear, reason) of every planned one whose module, or a module around it, is disabled or hooked."""
    model = None if attachment.watch is None else attachment.watch.model()
    if model is None:
        return
    modules = dict(model.named_modules())
    inside = {f"{name}.": HOOKED for name, module in modules.items() if _is_hooked(module)}
    inside |= {f"{name}.": REASON for name, module in modules.items() if _is_disabled(module)}
    planned = (site for adapter in attachment.plan.adapters for site in adapter.sites)
    for site in planned if inside else ():
        path = f"{base_name(site)}."
        around = [(name, reason) for name, reason in inside.items() if path.startswith(name)]
        reason = next((reason for name, reason in around if reason is REASON or _is_closed(name, path, modules)), None)
        if reason is not None:
            yield site, reason


def _is_disabled(module: nn.Module) -> bool:
    return bool(getattr(module.forward, "_torchdynamo_disable", False))


def _is_hooked(module: nn.Module) -> bool:
    # under compiled autograd, Dynamo traces such hooks
    return bool(module._backward_hooks or module._backward_pre_hooks) and not compiled_autograd.compiled_autograd_enabled


def _is_closed(around: str, path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether Dynamo starts no graph in any module from ``around`` down to a path, both with a dot at the end."""
    ends = [place for place, letter in enumerate(path) if letter == "." and place + 1 >= len(around)]
    between = (modules.get(path[:end]) for end in ends)
    return all(trace_rules.check(module.forward) for module in between if module is not None)
