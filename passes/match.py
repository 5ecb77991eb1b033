"""Match a traced graph with the plan: which linears of the graph have an adapter, and which.

In: a graph, its inputs and the attachments found on its weights. Out: ``Match`` objects, one per adapter and input
tensor, holding the linears they replace. A weight is matched by identity, so that one plan serves every graph that reads
it: prefill, decode, a piece between two graph breaks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, guard_or_false

from rana_fx.adapter import Adapter
from rana_fx.graph.dataflow import row_source, shape_of, value_of
from rana_fx.graph.graph_pass import Declined, Intended, Outdated
from rana_fx.graph.linears import Linear, Scan, find_linears, parameters_of, source_name
from rana_fx.graph.operands import Operand, operand
from rana_fx.kernels.triton.config import MAX_TOKENS
from rana_fx.notices import report
from rana_fx.passes.not_linears import not_linears
from rana_fx.plan import Plan
from rana_fx.runtime.attachment import Attachment, attachment_of, attachments_of
from rana_fx.runtime.changed_weights import gone, why_bias_stale, why_stale
from rana_fx.runtime.plan_option import attachment_for
from rana_fx.runtime.prefill import costs_more, tokens_adapted

_OTHER_WAY = "its weight is multiplied the other way round, by its transpose, which the plan does not stand for: it runs dense"
_FAKE = "the graph was given a fake tensor for its weight, and the weight itself was not found"
_FAKE_TODO = "Pass the inputs that Dynamo gives to the backend, or compile without what splits the graph."


@dataclass(frozen=True, eq=False)
class Match:
    """Linears over one input node that one adapter replaces, in graph order."""

    attachment: Attachment
    index: int
    adapter: Adapter
    linears: tuple[Linear, ...]
    named: Mapping[fx.Node, str]  # every linear of the graph -> its site
    number: int = 0  # index of the attachment among those of the graph

    @property
    def x(self) -> fx.Node:
        """The tensor they read."""
        return self.linears[0].x


@dataclass(frozen=True, eq=False)
class Matches:
    """The parts of the plan that apply to one graph."""

    scan: Scan
    attachments: tuple[Attachment, ...]
    found: tuple[Match, ...]
    missing: str | None  # a linear whose model has no plan, when none of the graph's has
    declined: tuple[Declined, ...] = ()  # planned linears, and other uses of their weights, that stay as they are in this graph

    @property
    def planned(self) -> set[str]:
        """Linears that an adapter replaces, or whose cost it changes, in all plans of the graph."""
        adapters = [adapter for attachment in self.attachments for adapter in attachment.plan.adapters]
        return {site for adapter in adapters for site in (*adapter.sites, *adapter.also)}


def match_plan(
    graph_module: fx.GraphModule, example_inputs: Sequence[object], plan: Plan | None = None, prefill: str = "masked"
) -> Matches:
    """Find what to replace. Linears without an adapter stay as they are.

    Args:
        plan: to use instead of what is attached to the weights.
        prefill: "dense": linears that read more tokens than the adapter is expected to save time for stay as they are, too;
            "cheapest": those that read more than MAX_TOKENS, where their factors take more multiply-adds. A graph with a symbolic
            number of tokens is then guarded on the comparison with that limit.
    """
    parameters = parameters_of(graph_module, example_inputs)
    given = None if plan is None else attachment_for(plan, parameters)
    attachments = attachments_of(parameters) if plan is None else [given] if given is not None else []
    names = {key: name for attachment in attachments for key, name in attachment.names.items()}
    scan = find_linears(graph_module, example_inputs, names)
    by_inputs = {one: {record.name for record in one.plan.sites if record.transposed} for one in attachments}  # stored (in, out)
    gathered: dict[tuple[Attachment, int, fx.Node, Hashable], list[Linear]] = {}
    declined: list[Declined] = []
    declined += [Outdated(*place) for attachment in attachments for place in gone(attachment)]
    for linear in scan.linears:
        attachment = attachment_of(linear.weight) if plan is None else given
        planned = attachment.adapter(linear.name) if attachment is not None else None
        if attachment is None or planned is None:
            continue
        index, adapter = planned
        reason = why_stale(attachment, linear.weight, index, adapter)
        reason = reason or why_bias_stale(attachment, _bias_of(linear, parameters), index, adapter)
        if reason is not None:
            declined.append(Outdated(linear.name, reason))
            continue
        if linear.transposed != (linear.name in by_inputs[attachment]):
            # as the backward pass of a linear does: the adapter stands for the other one of the two
            declined.append(Declined(linear.name, _OTHER_WAY))
            continue
        if row_source(linear.x) in scan.constant:
            # for example positions, multiplied by a weight that is also multiplied by tokens
            reason = "it reads no tokens: nothing was calibrated on its input"
        elif prefill == "dense" and not _at_most(linear.x, tokens_adapted(attachment.plan, adapter, linear.weight)):
            reason = _of_tokens(linear.x, "prefill=dense, and more tokens than the adapter is expected to be faster for")
        elif prefill == "cheapest" and costs_more(attachment.plan, adapter) and not _at_most(linear.x, MAX_TOKENS):
            reason = f"prefill=cheapest, more than {MAX_TOKENS} tokens, and its factors take more multiply-adds than it"
            reason = _of_tokens(linear.x, reason)
        if reason is None:
            gathered.setdefault((attachment, index, linear.x, linear.version), []).append(linear)
        else:
            declined.append(Intended(linear.name, reason))
    report(((source_name(node), _FAKE) for node, weight in parameters.items() if isinstance(weight, FakeTensor)), _FAKE_TODO)
    named = {linear.node: linear.name for linear in scan.linears}
    found = tuple(
        Match(attachment, index, attachment.plan.adapters[index], tuple(linears), named, attachments.index(attachment))
        for (attachment, index, *_), linears in gathered.items()
    )
    missing = scan.linears[0].name if scan.linears and not attachments else None
    declined += not_linears(graph_module.graph, scan, attachments)
    return Matches(scan, tuple(attachments), found, missing, tuple(declined))


def _bias_of(linear: Linear, parameters: Mapping[fx.Node, nn.Parameter]) -> nn.Parameter | None:
    """The Parameter that a linear's bias is, or is a part of."""
    shown = operand(linear.bias_node, parameters)
    return shown.parameter if isinstance(shown, Operand) else None


def gradients_flow(match: Match, node: fx.Node) -> bool:
    """Whether a node of the traced graph, or the node that replaces it, has a backward pass."""
    value = value_of(node)
    flows = isinstance(value, torch.Tensor) and value.requires_grad
    return torch.is_grad_enabled() and (flows or any(factor.requires_grad for factor in match.attachment.factors.parameters()))


def _at_most(x: fx.Node, tokens: int) -> bool:
    """Whether x has at most ``tokens`` rows. Comparing a symbolic number installs a guard; a number that depends on data (the
    tokens of an expert) cannot be guarded on and is decided by its known upper bound.
    """
    shape = shape_of(x)
    return shape is not None and guard_or_false(math.prod(shape[:-1]) <= tokens)


def _of_tokens(x: fx.Node, reason: str) -> str:
    """A reason extended by the number of rows of x, or by the fact that it is only known when the graph runs."""
    shape = shape_of(x)
    unknown = shape is not None and bool(free_unbacked_symbols(shape[:-1]))
    return f"{reason.partition(',')[0]}, and how many tokens it reads depends on data" if unknown else reason
