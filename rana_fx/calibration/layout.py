"""The model as adaptation sees it: sites, groups of sites and MLP blocks, merged over all traced graphs.

In: one ``Reading`` per graph of a forward pass, in order of execution. Out: a ``Layout`` without any FX node, so that
nothing downstream depends on how the model happened to be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.functionalize import written
from rana_fx.graph.linears import Skip
from rana_fx.graph.roles import Fact, Reading

OUTSIDE = ("head", "stem", "constant")


@dataclass(frozen=True, eq=False)
class Site:
    """One linear layer, by the name of its weight. ``role`` is explained in ``rana_fx.graph.roles``."""

    name: str
    op: str
    out_features: int
    in_features: int
    transposed: bool
    weight: nn.Parameter
    view: Tensor  # its matrix, (out, in): the weight, its transpose or a part of it
    bias: Tensor | None
    role: str
    uses: int  # occurrences in one forward pass
    group: int  # index into Layout.groups
    attention: int | None  # sites with one value feed the same attention

    @property
    def counted(self) -> bool:
        """Whether the budget counts it: linears inside the blocks that read data, not heads, stems or routers of experts."""
        return self.role not in (*OUTSIDE, "router")

    @property
    def flops(self) -> float:
        """Multiply-adds per token of the dense layer."""
        return float(self.uses * self.out_features * self.in_features)

    def matrix(self) -> Tensor:
        """The weight as (out, in), fp32, detached."""
        return self.view.float()


@dataclass(frozen=True, eq=False)
class Group:
    """Sites that read the same tensor, wherever they occur.

    ``seen_with``: every set of sites that an occurrence of the group reads its tensor with. One, unless a weight is used
    with different partners (keys of tokens and of positions, say); such a weight is a group of its own.
    """

    sites: tuple[str, ...]
    seen_with: frozenset[frozenset[str]]


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
    """Settle heads and stems, and merge the occurrences of shared weights."""
    facts = [(index, fact) for index, reading in enumerate(readings) for fact in reading.facts]
    skips = list(dict.fromkeys(skip for reading in readings for skip in reading.scan.skips))
    twisted = _twisted(facts)
    skips += [Skip(name, "its weight is also used transposed, and one adapter cannot serve both") for name in twisted]
    facts = [(index, fact) for index, fact in facts if fact.linear.name not in twisted]
    _settle_outside(facts)
    groups = _groups([[fact for fact in reading.facts if fact.linear.name not in twisted] for reading in readings])
    sites = _sites(facts, {name: i for i, group in enumerate(groups) for name in group.sites})
    skips = [skip for skip in skips if skip.site not in sites]
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
    kept = tuple(block for block in blocks.values() if _stands(block, sites))
    nodes = sum(len(reading.scan.linears) for reading in readings)
    return Layout(sites, groups, kept, tuple(skips), len(readings), nodes)


def _twisted(facts: Sequence[tuple[int, Fact]]) -> list[str]:
    """Weights used as they are and transposed: one adapter cannot serve both."""
    ways: dict[str, set[bool]] = {}
    for _, fact in facts:
        ways.setdefault(fact.linear.name, set()).add(fact.linear.transposed)
    return sorted(name for name, found in ways.items() if len(found) > 1)


def _groups(readings: Sequence[Sequence[Fact]]) -> tuple[Group, ...]:
    """Sites that are always read together are one group; one that also occurs with others is a group of its own."""
    data = {fact.linear.name for facts in readings for fact in facts if fact.role != "constant"}
    together: dict[frozenset[str], tuple[str, ...]] = {}
    members: dict[str, set[frozenset[str]]] = {}
    for facts in readings:
        # a table that a layer also reads is no partner, and no sample of what tokens bring
        counted = [fact for fact in facts if fact.role != "constant" or fact.linear.name not in data]
        for key in observed_together(counted).values():
            together.setdefault(frozenset(key), key)
            for name in key:
                members.setdefault(name, set()).add(frozenset(key))
    groups: dict[tuple[str, ...], Group] = {}
    for occurrence, names in together.items():
        shared = tuple(name for name in names if members[name] == {occurrence})
        alone = [(name,) for name in names if len(members[name]) > 1]
        for sites in ([shared] if shared else []) + alone:
            groups.setdefault(sites, Group(sites, frozenset(members[sites[0]])))
    return tuple(groups.values())


def observed_together(facts: Sequence[Fact]) -> dict[tuple[fx.Node, fx.Node | None], tuple[str, ...]]:
    """Tensor read -> names of the linears of one graph that read it, in order."""
    found: dict[tuple[fx.Node, fx.Node | None], dict[str, None]] = {}
    for fact in facts:
        found.setdefault(fact.linear.source, {})[fact.linear.name] = None
    return {source: tuple(names) for source, names in found.items()}


def _stands(block: MlpBlock, sites: dict[str, Site]) -> bool:
    """All of it is inside the budget, and its ups belong to one group everywhere."""
    return all(sites[name].counted for name in block.sites) and len({sites[name].group for name in block.ups}) == 1


def _settle_outside(facts: Sequence[tuple[int, Fact]]) -> None:
    """Heads follow the last residual join; stems make the stream that everything else is added to."""
    if not any(fact.joins_residual for _, fact in facts):
        return  # nothing joins a residual stream, so there is no inside to be outside of
    first, last = facts[0][0], facts[-1][0]
    heads = {
        fact.linear
        for index, fact in facts
        # also what only meets another tower's output (contrastive losses), or reads an attention pool
        if index == last and not fact.joins_residual and fact.role not in ("router", "constant") or _is_embedding(fact)
    }
    changed = True
    while changed:
        nodes = {linear.node for linear in heads}
        kept = {fact.linear for _, fact in facts if fact.linear in heads and (fact.feeds <= nodes or _is_embedding(fact))}
        changed, heads = kept != heads, kept
    for index, fact in facts:
        if fact.linear in heads:
            fact.role = "head"
        elif index == first and fact.role == "other" and fact.starts_stream:
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
    for name, occurrences in merged.items():
        # an occurrence that reads no data (a table of positions) is not a cost per token
        found = [item for item in occurrences if item[1].role != "constant"] or occurrences
        index, fact = found[0]
        linear = fact.linear
        attention = None
        if fact.attention is not None:
            attention = attentions.setdefault((index, fact.attention), len(attentions))
        sites[name] = Site(
            name, linear.op, linear.out_features, linear.in_features, linear.transposed, linear.weight,
            linear.matrix, linear.bias, fact.role, len(found), group_of[name], attention,
        )  # fmt: skip
    return sites


def _replay(module: fx.GraphModule) -> Callable[..., Tensor]:
    """A pointwise chain with its constants (learned scales, say) bound to the tensors they are."""
    constants = [_constant(node) for node in module.rana_constants]  # type: ignore[union-attr]
    writes = any(written(node) is not None for node in module.graph.nodes)

    def run(*rows: Tensor) -> Tensor:
        with torch.no_grad():
            # the caller keeps its rows, whatever the chain does in place
            return module(*(row.clone() if writes else row for row in rows), *constants)  # type: ignore[no-any-return]

    return run


def _constant(node: fx.Node) -> object:
    real = node.meta.get("rana_real")
    if isinstance(real, Tensor) and real.dim() > 1:
        return real.reshape(-1)  # one row, whatever the number of leading dimensions
    return real if real is not None else value_of(node)
