"""The model as adaptation sees it: sites, groups of sites and MLP blocks, merged over all traced graphs.

In: one ``TracedGraph`` per graph of a forward pass, in order of execution, for every kind of forward pass in calibration. Out: a
``Layout`` without any FX node, so that no later step depends on the way in which the model was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from rana_fx.calibration.forward_passes import in_order, spliced
from rana_fx.graph.dataflow import value_of
from rana_fx.graph.linears import Skip
from rana_fx.graph.mlp_blocks import Rowwise, TracedMlp
from rana_fx.graph.roles import Occurrence, TracedGraph

# roles that a budget does not count, by its scope: what reads nothing of the batch has no cost per token, and routers of experts
# select what else is computed
OUTSIDE = {"blocks": ("head", "stem", "constant", "router"), "all": ("constant", "router")}
OUTSIDE_OF_GRAPHS = "ran outside of any traced graph"


@dataclass(frozen=True, eq=False)
class Site:
    """One linear layer, by the name of its weight. ``role`` is explained in ``rana_fx.graph.roles``.

    ``scope``: of the budget. ``is_table``: the weight is an embedding table as well. ``left``: by the caller's choice, to itself.
    """

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
    scope: str = "blocks"
    is_table: bool = False
    left: bool = False

    @property
    def counted(self) -> bool:
        """Whether the budget counts it: linears that read data but routers of experts; with scope "blocks" no heads and stems."""
        return not self.left and self.role not in OUTSIDE[self.scope]

    @property
    def outside_blocks(self) -> bool:
        """Whether it is a head or a stem."""
        return self.role in ("head", "stem")

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
    with different partners (such as keys of tokens and of positions); such a weight is a group of its own.
    """

    sites: tuple[str, ...]
    seen_with: frozenset[frozenset[str]]


@dataclass(frozen=True, eq=False)
class MlpBlock:
    """``down(pointwise(up(x), ...))``: names of its sites, and functions of rows.

    ``pointwise``: (tokens, features) of each up's output -> rows of down's input. ``activation``: rows of the output of
    ``ups[gate]`` -> the activated gate; None where what down reads is no product with one.
    """

    ups: tuple[str, ...]
    down: str
    gate: int
    pointwise: Callable[..., Tensor]
    activation: Callable[..., Tensor] | None

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.ups, self.down)


@dataclass(frozen=True)
class Unread:
    """Matrices of the model that no traced graph reads: how many there are in ``module`` (or the one of that name).

    ``eager``: they are read outside of the graphs, where compilation is switched off or failed; otherwise no batch reads them.
    """

    module: str
    count: int
    eager: bool

    @property
    def linears(self) -> str:
        """Their number and kind, as text."""
        return f"{self.count} linears of {self.module}" if self.count > 1 else f"the linear {self.module}"


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything that adaptation takes from a model.

    ``graphs``: the largest number of graphs of a forward pass. ``unread``: matrices that no graph reads.
    """

    sites: dict[str, Site]
    groups: tuple[Group, ...]
    blocks: tuple[MlpBlock, ...]
    skips: tuple[Skip, ...]
    graphs: int
    unread: tuple[Unread, ...] = ()

    def group_of(self, site: str) -> Group:
        """The group of a site. Raises KeyError."""
        return self.groups[self.sites[site].group]

    def sites_of_group(self, site: str) -> tuple[str, ...]:
        """Names of all sites in the group of ``site``: the key of its sample in ``Calibration.samples``. Raises KeyError."""
        return self.group_of(site).sites

    def stacks(self) -> list[tuple[str, ...]]:
        """Attention inputs that read one tensor and feed one attention: the paper's stacked qkv (or a fused one)."""
        found: dict[tuple[int, int | None], list[str]] = {}
        for site in self.sites.values():
            if site.role == "attention_in" and site.counted:
                found.setdefault((site.group, site.attention), []).append(site.name)
        return [tuple(names) for names in found.values()]


def merge(kinds: Sequence[Sequence[TracedGraph]], scope: str = "blocks") -> Layout:
    """Determine heads and stems, and merge the occurrences of shared weights.

    Args:
        kinds: the graphs of each kind of forward pass. Facts on a site of several kinds are those of the first (``in_order``).
        scope: of the budget, a key of ``OUTSIDE``.
    """
    kinds = in_order(kinds)
    graphs = list({id(graph): graph for kind in kinds for graph in kind}.values())
    occurrences = [found for graph in graphs for found in graph.occurrences]
    both, biased = _used_both_orientations(occurrences), _used_with_two_biases(occurrences)
    left = {*both, *biased}
    groups = _groups([[item for item in graph.occurrences if item.linear.name not in left] for graph in graphs])
    sites = _sites_of_kinds(kinds, {name: i for i, group in enumerate(groups) for name in group.sites})
    tables = {id(weight) for graph in graphs for node, weight in graph.scan.weights.items() if _is_table(node)}
    sites = {name: replace(site, scope=scope, is_table=id(site.weight) in tables) for name, site in sites.items()}
    skips = _skips(kinds)
    skips += [Skip(name, "its weight is also used transposed, and one adapter cannot serve both") for name in both]
    skips += [Skip(name, "its weight is used with different biases, and one adapter cannot serve both") for name in biased]
    skips = [skip for skip in skips if skip.site not in sites]
    adaptable = tuple(block for block in _blocks(kinds, sites) if _is_adaptable(block, sites))
    return Layout(sites, groups, adaptable, tuple(skips), max(map(len, kinds), default=0))


def _sites_of_kinds(kinds: Sequence[Sequence[TracedGraph]], group_of: dict[str, int]) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    attentions: dict[tuple[int, fx.Node], int] = {}
    order: list[str] = []
    for kind in kinds:
        # copies: what is a head in one kind of forward pass may not be one in another
        found = [(index, replace(item)) for index, graph in enumerate(kind) for item in graph.occurrences]
        found = [item for item in found if item[1].linear.name in group_of]
        _settle_outside(found)
        made = _sites(found, group_of, attentions)
        order = spliced(order, made)
        sites = made | sites
    return {name: sites[name] for name in order}


def _skips(kinds: Sequence[Sequence[TracedGraph]]) -> list[Skip]:
    skips: list[Skip] = []
    for kind in kinds:
        known = {skip.site for skip in skips}
        skips += dict.fromkeys(skip for graph in kind for skip in graph.scan.skips if skip.site not in known)
    return skips


def _blocks(kinds: Sequence[Sequence[TracedGraph]], sites: Mapping[str, Site]) -> list[MlpBlock]:
    """The MLP blocks whose members are sites, and which are equal in every kind of forward pass that has their down."""
    found: dict[str, MlpBlock] = {}
    unlike: set[str] = set()
    for kind in kinds:
        own = {
            block.down.name: _block(block, graph.values)
            for graph in kind
            for block in graph.blocks
            if all(member.name in sites for member in (*block.ups, block.down))
        }
        unlike |= {
            name for name in own.keys() & found.keys() if (own[name].ups, own[name].gate) != (found[name].ups, found[name].gate)
        }
        found = found | {name: block for name, block in own.items() if name not in found}
    return [block for name, block in found.items() if name not in unlike]


def _used_both_orientations(found: Sequence[Occurrence]) -> list[str]:
    """Weights used as they are and transposed."""
    ways: dict[str, set[bool]] = {}
    for occurrence in found:
        ways.setdefault(occurrence.linear.name, set()).add(occurrence.linear.transposed)
    return sorted(name for name, orientations in ways.items() if len(orientations) > 1)


def _used_with_two_biases(found: Sequence[Occurrence]) -> list[str]:
    """Weights of several linears that do not have the same bias: an adapter has one of its own, or none."""
    biases: dict[str, set[tuple[int, int] | None]] = {}
    for occurrence in found:
        bias = occurrence.linear.bias
        place = None if bias is None else (bias.data_ptr(), bias.numel())
        biases.setdefault(occurrence.linear.name, set()).add(place)
    return sorted(name for name, held in biases.items() if len(held) > 1)


def _groups(graphs: Sequence[Sequence[Occurrence]]) -> tuple[Group, ...]:
    """Sites that are always read together are one group; one that also occurs with others is a group of its own."""
    data = {found.linear.name for graph in graphs for found in graph if found.role != "constant"}
    together: dict[frozenset[str], tuple[str, ...]] = {}
    members: dict[str, set[frozenset[str]]] = {}
    for graph in graphs:
        # a table that a layer also reads is no partner, and no sample of what tokens bring
        counted = [found for found in graph if found.role != "constant" or found.linear.name not in data]
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


def observed_together(found: Sequence[Occurrence]) -> dict[tuple[fx.Node, Hashable], tuple[str, ...]]:
    """Tensor read -> names of the linears of one graph that read it, in order."""
    names: dict[tuple[fx.Node, Hashable], dict[str, None]] = {}
    for occurrence in found:
        names.setdefault(occurrence.linear.source, {})[occurrence.linear.name] = None
    return {source: tuple(readers) for source, readers in names.items()}


def _is_adaptable(block: MlpBlock, sites: dict[str, Site]) -> bool:
    """All of it is inside the budget, and its ups belong to one group everywhere."""
    return all(sites[name].counted for name in block.sites) and len({sites[name].group for name in block.ups}) == 1


def _settle_outside(found: Sequence[tuple[int, Occurrence]]) -> None:
    """Heads follow the last residual join; stems make the stream that everything else is added to."""
    if not any(occurrence.joins_residual for _, occurrence in found):
        return  # nothing joins a residual stream, so there is no inside to be outside of
    first, last = found[0][0], found[-1][0]
    heads = {
        occurrence.linear
        for index, occurrence in found
        # also what is only multiplied by another tower's output (contrastive losses), or reads an attention pool
        if index == last and not occurrence.joins_residual and occurrence.role not in ("router", "constant")
        or _is_embedding(occurrence)
    }  # fmt: skip
    changed = True
    while changed:
        nodes = {linear.node for linear in heads}
        kept = {
            occurrence.linear
            for _, occurrence in found
            if occurrence.linear in heads and (occurrence.feeds <= nodes or _is_embedding(occurrence))
        }
        changed, heads = kept != heads, kept
    for index, occurrence in found:
        if occurrence.linear in heads:
            occurrence.role = "head"
        elif index == first and occurrence.role == "other" and occurrence.starts_stream:
            occurrence.role = "stem"


def _is_embedding(found: Occurrence) -> bool:
    """A weight tied to an embedding table is the output head, wherever it stands."""
    return _is_table(found.linear.weight_node)


def _is_table(weight: fx.Node) -> bool:
    return any(getattr(user.target, "__name__", "") == "embedding" for user in weight.users)


def _sites(
    found: Iterable[tuple[int, Occurrence]], group_of: dict[str, int], attentions: dict[tuple[int, fx.Node], int]
) -> dict[str, Site]:
    """The sites of one kind of forward pass. ``attentions``: numbers of attentions assigned so far."""
    sites: dict[str, Site] = {}
    merged: dict[str, list[tuple[int, Occurrence]]] = {}
    for index, occurrence in found:
        if occurrence.linear.name in group_of:
            merged.setdefault(occurrence.linear.name, []).append((index, occurrence))
    for name, everywhere in merged.items():
        # an occurrence that reads no data (a table of positions) is not a cost per token
        counted = [item for item in everywhere if item[1].role != "constant"] or everywhere
        index, occurrence = counted[0]
        linear = occurrence.linear
        attention = None
        if occurrence.attention is not None:
            attention = attentions.setdefault((index, occurrence.attention), len(attentions))
        sites[name] = Site(
            name=name,
            op=linear.op,
            out_features=linear.out_features,
            in_features=linear.in_features,
            transposed=linear.transposed,
            weight=linear.weight,
            view=linear.matrix,
            bias=linear.bias,
            role=occurrence.role,
            uses=len(counted),
            group=group_of[name],
            attention=attention,
        )
    return sites


def _block(block: TracedMlp, values: Mapping[fx.Node, Tensor]) -> MlpBlock:
    return MlpBlock(
        ups=tuple(up.name for up in block.ups),
        down=block.down.name,
        gate=block.gate,
        pointwise=_bound(block.pointwise, values),
        activation=None if block.activation is None else _bound(block.activation, values),
    )


def _bound(chain: Rowwise, values: Mapping[fx.Node, Tensor]) -> Callable[..., Tensor]:
    """A chain of operations with its constants (such as learned scales) bound to the tensors they are."""
    constants = [_constant(node, values) for node in chain.constants]

    def run(*rows: Tensor) -> Tensor:
        with torch.no_grad():
            # in-place operations of the chain must not reach the caller's rows
            return chain.module(*(row.clone() if chain.writes else row for row in rows), *constants)  # type: ignore[no-any-return]

    return run


def _constant(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> object:
    real = values.get(node)
    if real is not None and real.dim() > 1:
        return real.reshape(-1)  # one row, whatever the number of leading dimensions
    return real if real is not None else value_of(node)
