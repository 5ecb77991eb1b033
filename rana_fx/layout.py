"""The model as adaptation sees it: sites, groups of sites and MLP blocks, merged over all traced graphs.

In: one ``Reading`` per graph of a forward pass, in order of execution. Out: a ``Layout`` without any FX node, so that
nothing downstream depends on how the model happened to be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rana_fx.graph import value_of
from rana_fx.groups import Fact, Reading
from rana_fx.sites import Skip

OUTSIDE = ("head", "stem")


@dataclass(frozen=True, eq=False)
class Site:
    """One linear layer, by the name of its weight. ``role`` is explained in ``rana_fx.groups``."""

    name: str
    op: str
    out_features: int
    in_features: int
    transposed: bool
    weight: nn.Parameter
    bias: nn.Parameter | None
    role: str
    uses: int  # occurrences in one forward pass
    group: int  # index into Layout.groups
    attention: int | None  # sites with one value feed the same attention

    @property
    def counted(self) -> bool:
        """Whether the budget counts it: linears inside the blocks, not heads, stems or routers of experts."""
        return self.role not in (*OUTSIDE, "router")

    @property
    def flops(self) -> float:
        """Multiply-adds per token of the dense layer."""
        return float(self.uses * self.out_features * self.in_features)

    def matrix(self) -> Tensor:
        """The weight as (out, in), fp32, detached."""
        weight = self.weight.detach()
        return (weight.t() if self.transposed else weight).float()


@dataclass(frozen=True, eq=False)
class Group:
    """Sites that read the same tensor. ``inputs``: graph inputs it depends on (decides which padding mask applies)."""

    sites: tuple[str, ...]
    inputs: frozenset[str]


@dataclass(frozen=True, eq=False)
class MlpBlock:
    """``down(pointwise(up(x), ...))``: names of its sites and its pointwise part, replayable on any rows."""

    ups: tuple[str, ...]
    down: str
    gate: int
    pointwise: Callable[..., Tensor]
    activation: Callable[..., Tensor] | None

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.ups, self.down)


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything adaptation needs to know of a model."""

    sites: dict[str, Site]
    groups: tuple[Group, ...]
    blocks: tuple[MlpBlock, ...]
    skips: tuple[Skip, ...]
    graphs: int
    nodes: int

    def stacks(self) -> list[tuple[str, ...]]:
        """Attention inputs that read one tensor and feed one attention: the paper's stacked qkv (or a fused one)."""
        found: dict[tuple[int, int | None], list[str]] = {}
        for site in self.sites.values():
            if site.role == "attention_in":
                found.setdefault((site.group, site.attention), []).append(site.name)
        return [tuple(names) for names in found.values()]


def merge(readings: Sequence[Reading]) -> Layout:
    """Settle heads and stems, merge occurrences of shared weights and drop what cannot be one group everywhere."""
    facts = [(index, fact) for index, reading in enumerate(readings) for fact in reading.facts]
    _settle_outside(facts, last=len(readings) - 1)
    groups: dict[tuple[str, ...], Group] = {}
    members: dict[str, set[tuple[str, ...]]] = {}
    for index, reading in enumerate(readings):
        by_source: dict[tuple[int, fx.Node], list[Fact]] = {}
        for fact in reading.facts:
            by_source.setdefault((index, fact.linear.source), []).append(fact)
        for together in by_source.values():
            key = tuple(dict.fromkeys(fact.linear.name for fact in together))
            groups.setdefault(key, Group(key, frozenset().union(*(fact.inputs for fact in together))))
            for name in key:
                members.setdefault(name, set()).add(key)
    skips = list(dict.fromkeys(skip for reading in readings for skip in reading.scan.skips))
    conflicted = {name for name, keys in members.items() if len(keys) > 1}
    skips += [Skip(name, "its weight is shared by groups with different partners") for name in sorted(conflicted)]
    sound = [key for key in groups if not conflicted & set(key)]
    sites = _sites(facts, {name: i for i, key in enumerate(sound) for name in key})
    blocks = {
        block.down.name: MlpBlock(
            tuple(up.name for up in block.ups),
            block.down.name,
            block.gate,
            _replay(block.pointwise),
            None if block.activation is None else _replay(block.activation),
        )  # fmt: skip
        for reading in readings
        for block in reading.blocks
        if all(member.name in sites for member in (*block.ups, block.down))
    }
    kept = tuple(block for block in blocks.values() if all(sites[name].counted for name in block.sites))
    nodes = sum(len(reading.scan.linears) for reading in readings)
    return Layout(sites, tuple(groups[key] for key in sound), kept, tuple(skips), len(readings), nodes)


def _settle_outside(facts: list[tuple[int, Fact]], last: int) -> None:
    """Heads follow the last residual join; stems precede every other linear and are neither attention nor MLP."""
    if not any(fact.joins_residual for _, fact in facts):
        return  # nothing joins a residual stream, so there is no inside to be outside of
    heads = {
        fact.linear
        for index, fact in facts
        if index == last and not fact.joins_residual and fact.role in ("other", "up", "down") or _is_embedding(fact)
    }
    changed = True
    while changed:
        kept = {fact.linear for _, fact in facts if fact.linear in heads and (fact.feeds <= heads or _is_embedding(fact))}
        changed, heads = kept != heads, kept
    for _, fact in facts:
        if fact.linear in heads:
            fact.role = "head"
        elif fact.role == "other" and not fact.has_upstream:
            fact.role = "stem"


def _is_embedding(fact: Fact) -> bool:
    """A weight tied to an embedding table is the output head, wherever it stands."""
    return any(getattr(user.target, "__name__", "") == "embedding" for user in fact.linear.weight_node.users)


def _sites(facts: Iterable[tuple[int, Fact]], group_of: dict[str, int]) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    attentions: dict[tuple[int, fx.Node], int] = {}
    merged: dict[str, list[tuple[int, Fact]]] = {}
    for index, fact in facts:
        if fact.linear.name in group_of:
            merged.setdefault(fact.linear.name, []).append((index, fact))
    for name, found in merged.items():
        index, fact = found[0]
        linear = fact.linear
        attention = None
        if fact.attention is not None:
            attention = attentions.setdefault((index, fact.attention), len(attentions))
        sites[name] = Site(
            name, linear.op, linear.out_features, linear.in_features, linear.transposed, linear.weight, linear.bias,
            fact.role, len(found), group_of[name], attention,
        )  # fmt: skip
    return sites


def _replay(module: fx.GraphModule) -> Callable[..., Tensor]:
    """A pointwise chain with its constants (learned scales, say) bound to the tensors they are."""
    constants = [_constant(node) for node in module.rana_constants]  # type: ignore[union-attr]

    def run(*rows: Tensor) -> Tensor:
        with torch.no_grad():
            return module(*rows, *constants)  # type: ignore[no-any-return]

    return run


def _constant(node: fx.Node) -> object:
    real = node.meta.get("rana_real")
    return real if real is not None else value_of(node)
