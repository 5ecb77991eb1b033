"""Match a traced graph with the plan: which linears of the graph have an adapter, and which.

In: a graph, its inputs and the attachments found on its weights. Out: ``Match`` objects, one per adapter and input
tensor, holding the linears they replace. A weight is known by identity, so the same plan serves every graph it shows
up in: prefill, decode, a piece between two graph breaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from rana_fx.adapter import Adapter
from rana_fx.graph.dataflow import row_source, shape_of, value_of
from rana_fx.graph.graph_pass import Declined, Intended
from rana_fx.graph.linears import Linear, Scan, find_linears, parameters_of
from rana_fx.kernels.triton.config import MAX_TOKENS
from rana_fx.passes.not_linears import not_linears
from rana_fx.plan import Plan
from rana_fx.runtime.attachment import Attachment, attachment_of
from rana_fx.runtime.plan_option import attachment_for
from rana_fx.runtime.prefill import costs_more, tokens_masked


@dataclass(frozen=True, eq=False)
class Match:
    """Linears over one input node that one adapter replaces, in graph order."""

    attachment: Attachment
    index: int
    adapter: Adapter
    linears: tuple[Linear, ...]
    named: Mapping[fx.Node, str]  # every linear of the graph -> its site

    @property
    def x(self) -> fx.Node:
        """The tensor they read."""
        return self.linears[0].x


@dataclass(frozen=True, eq=False)
class Matches:
    """What the plan says about one graph."""

    scan: Scan
    attachments: tuple[Attachment, ...]
    found: tuple[Match, ...]
    missing: str | None  # a linear whose model has no plan, when none of the graph's has
    declined: tuple[Declined, ...] = ()  # planned linears, and other uses of their weights, that stay as they are in this graph

    @property
    def planned(self) -> set[str]:
        """Linears that an adapter stands for, or whose cost it changes, in all of the plans."""
        adapters = [adapter for attachment in self.attachments for adapter in attachment.plan.adapters]
        return {site for adapter in adapters for site in (*adapter.sites, *adapter.also)}


def match_plan(
    graph_module: fx.GraphModule, example_inputs: Sequence[object], plan: Plan | None = None, prefill: str = "masked"
) -> Matches:
    """Find what to replace. Linears without an adapter stay as they are.

    Args:
        plan: to use instead of what is attached to the weights.
        prefill: "dense": linears that read more tokens than skipping pays for stay as they are, too; "cheapest": those that read
            more than MAX_TOKENS, where their factors cost more. A graph for a varying number of tokens is then guarded on which
            side of that its number lies.
    """
    parameters = parameters_of(graph_module, example_inputs)
    given = None if plan is None else attachment_for(plan, parameters)
    if plan is None:
        attachments = list(dict.fromkeys(a for a in map(attachment_of, parameters.values()) if a is not None))
    else:
        attachments = [] if given is None else [given]
    names = {key: name for attachment in attachments for key, name in attachment.names.items()}
    scan = find_linears(graph_module, example_inputs, names)
    gathered: dict[tuple[Attachment, int, fx.Node], list[Linear]] = {}
    declined: list[Declined] = []
    for linear in scan.linears:
        attachment = attachment_of(linear.weight) if plan is None else given
        planned = attachment.adapter(linear.name) if attachment is not None else None
        if attachment is None or planned is None:
            continue
        index, adapter = planned
        reason = None
        if row_source(linear.x) in scan.constant:
            # positions, say, computed by a weight that also reads tokens
            reason = "it reads no tokens: nothing was calibrated on its input"
        elif prefill == "dense" and not _at_most(linear.x, tokens_masked(attachment.plan, adapter, linear.weight)):
            reason = "prefill=dense, and more tokens than masks are faster for"
        elif prefill == "cheapest" and costs_more(attachment.plan, adapter) and not _at_most(linear.x, MAX_TOKENS):
            reason = f"prefill=cheapest, more than {MAX_TOKENS} tokens, and its factors take more multiply-adds than it"
        if reason is None:
            gathered.setdefault((attachment, index, linear.x), []).append(linear)
        else:
            declined.append(Intended(linear.name, reason))
    named = {linear.node: linear.name for linear in scan.linears}
    found = tuple(
        Match(attachment, index, attachment.plan.adapters[index], tuple(linears), named)
        for (attachment, index, _), linears in gathered.items()
    )
    missing = scan.linears[0].name if scan.linears and not attachments else None
    declined += not_linears(graph_module.graph, scan, attachments)
    return Matches(scan, tuple(attachments), found, missing, tuple(declined))


def gradients_flow(match: Match, node: fx.Node) -> bool:
    """Whether a node of the traced graph, or what a rewrite puts in its place, has a backward pass."""
    value = value_of(node)
    flows = isinstance(value, torch.Tensor) and value.requires_grad
    return torch.is_grad_enabled() and (flows or any(factor.requires_grad for factor in match.attachment.factors.parameters()))


def _at_most(x: fx.Node, tokens: int) -> bool:
    """Whether x has at most so many rows. Deciding it for a symbolic number installs a guard."""
    shape = shape_of(x)
    return shape is not None and bool(math.prod(shape[:-1]) <= tokens)
