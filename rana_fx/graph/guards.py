"""Make Dynamo recompile when a graph would run with other weights or another plan.

In: the graph inputs of the weights a rewrite depends on. Out: guards in the compile that is in progress.
Why: Dynamo inlines modules, so one graph may serve every layer of a model compiled in pieces (graph breaks, or
``layer.compile()``), with the layer's weights as inputs. A rewrite bakes in the factors of one layer, so the weight's
identity, and the attachment found on it, become part of what the compiled code is valid for.

A ``guard_filter_fn`` that was given to torch.compile says that modules do not change, and selects among all other guards. Of the
weights of one module the first is then guarded alone: it tells one layer from another, and one plan from another, since
``attach`` and ``detach`` renew the marks of all weights of a plan. Guards on all weights would be
a part of every call that the filter is there to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.hooks import Hooks
from torch._dynamo.source import AttrSource
from torch._guards import Guard, TracingContext

from rana_fx.errors import InvalidOption
from rana_fx.graph.callers import variable_of_caller
from rana_fx.graph.real_values import local, root_of, source_of

ATTRIBUTE = "_rana_fx"  # where an attachment sits on a Parameter


def guard_weights(nodes: Iterable[fx.Node], *, attachment: bool) -> None:
    """Guard on the identity of each weight and of its owner, and (``attachment``) on the attachment it carries.

    Raises:
        InvalidOption: PyTorch is configured to drop guards on identity.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    if TracingContext.try_get() is None:  # called on a plain GraphModule, outside of a compile
        return
    if getattr(torch._dynamo.config, "caching_precompile", False):
        expected = (
            "False, since PyTorch drops guards on the identity of weights, so that a layer would run by the factors of another"
        )
        raise InvalidOption(name="torch._dynamo.config.caching_precompile", got=True, expected=expected)
    kept: list[Guard] = []
    roots: set[Any] = set()
    hooks = variable_of_caller("_compile", "hooks", Hooks)
    filtered = hooks is not None and hooks.guard_filter_fn is not None
    for node in nodes:
        source = source_of(node)
        if source is None or (filtered and root_of(source) in roots and isinstance(local(root_of(source)), nn.Module)):
            continue
        kept.append(source.make_guard(GuardBuilder.ID_MATCH))
        if attachment:
            kept.append(AttrSource(source, ATTRIBUTE).make_guard(GuardBuilder.ID_MATCH))
        roots.add(root_of(source))
    install_guard(*kept)
    if filtered:
        _keep(kept, hooks)
    for root in roots:
        # an id-matched root makes Dynamo count its recompile limit per module instead of per function
        if isinstance(local(root), nn.Module):
            install_guard(root.make_guard(GuardBuilder.ID_MATCH))


class _Filter:
    """A ``guard_filter_fn`` that keeps some guards whatever the one that was given selects."""

    def __init__(self, given: Callable[[Sequence[Any]], Sequence[bool]]) -> None:
        self._given = given
        self.kept: set[object] = set()

    def __call__(self, entries: Sequence[Any]) -> Sequence[bool]:
        chosen = self._given(entries)
        return [keep or _key(entry.orig_guard) in self.kept for keep, entry in zip(chosen, entries, strict=True)]


def _key(guard: Guard) -> object:
    return guard.name, guard.create_fn  # Dynamo may have installed an equal one before


def _keep(guards: Iterable[Guard], hooks: Any) -> None:
    """Exempt guards from the filter of the compilation in progress."""
    if not isinstance(hooks.guard_filter_fn, _Filter):
        hooks.guard_filter_fn = _Filter(hooks.guard_filter_fn)
    hooks.guard_filter_fn.kept |= set(map(_key, guards))
