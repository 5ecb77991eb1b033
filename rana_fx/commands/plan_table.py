"""A plan in a few lines: cost of the linears by role and layer, and adapters by kind; or a line for every adapter.

In: a plan. Out: tables for ``commands.screen``. A layer is the first number in a linear's name, as ``nn.ModuleList`` gives;
neighbouring layers share a line or a column where there are many, so that the table of any model fits on a screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rana_fx.commands.screen import Screen
from rana_fx.cost import Cost
from rana_fx.report_rows import counted_remarks, too_few_tokens
from rana_fx.skips import Note, Skip, is_too_few
from rana_fx.summary import layer_of

if TYPE_CHECKING:
    from rana_fx.plan import Plan, SiteRecord

LINES = 16  # of layers
RANGES = 5  # of layers, in columns

Table = tuple[tuple[str, ...], list[tuple[object, ...]]]  # columns, rows


def show_plan(screen: Screen, title: str, plan: Plan, *, every_adapter: bool) -> None:
    """Print the plan: by role and layer and by kind, or with ``every_adapter`` a line per adapter; then its remarks."""
    if every_adapter:
        screen.table(title, *by_adapter(plan))
        screen.lines([f"note: {_text(note)}" for note in plan.skips if isinstance(note, Note)], whole=True)
        return
    screen.lines([title], whole=True)
    screen.summary(f"{plan.metric} over dense, by role and layers", *by_role(plan))
    screen.summary("adapters by kind", *by_kind(plan))
    screen.lines(remarks(plan))


def remarks(plan: Plan) -> list[str]:
    """Linears with too few tokens, counted; then the number of other remarks and the first of them."""
    few = [(entry.site, entry.reason) for entry in plan.skips if is_too_few(entry.reason)]
    notes = [entry for entry in plan.skips if isinstance(entry, Note) and not is_too_few(entry.reason)]
    notes.sort(key=lambda note: note.site != "")
    return [*too_few_tokens(few), *counted_remarks([_text(note) for note in notes])]


def _text(entry: Note | Skip) -> str:
    return f"{entry.site}: {entry.reason}" if entry.site else entry.reason


def by_role(plan: Plan) -> Table:
    """Expected cost over dense in the plan's metric: rows are roles, columns ranges of layers; as ``by_layer``."""
    columns, rows = by_layer(plan, lines=RANGES)
    spans = [str(row[0]).replace(" to ", "-").replace("no layer", "none") for row in rows]
    return ("layers", *spans), [(columns[index], *(row[index] for row in rows)) for index in range(1, len(columns))]


def by_layer(plan: Plan, *, lines: int = LINES) -> Table:
    """Expected cost over dense in the plan's metric: rows are layers, columns roles; linears outside the budget left out."""
    ratios = _ratios(plan)
    counted = [site for site in plan.sites if site.counted]
    roles = list(dict.fromkeys(site.role for site in counted))
    layers = sorted({layer_of(site.name) for site in counted}, key=lambda layer: (layer is None, layer or 0))
    size = -(-len(layers) // lines) or 1
    rows: list[tuple[object, ...]] = []
    for first in range(0, len(layers), size):
        some = layers[first : first + size]
        held = [site for site in counted if layer_of(site.name) in some]
        rows.append((_span(some), *(_cost(plan, ratios, held, role) for role in [*roles, None])))
    rows.append(("all", *(_cost(plan, ratios, counted, role) for role in [*roles, None])))
    return ("layer", *(role.replace("_", " ") for role in roles), "all"), rows


def by_kind(plan: Plan) -> Table:
    """One row per kind of adapter: how many, the linears they replace, the fraction they keep, their cost over dense."""
    rows: list[tuple[object, ...]] = []
    for kind in dict.fromkeys(adapter.kind for adapter in plan.adapters):
        some = [adapter for adapter in plan.adapters if adapter.kind == kind]
        linears, ranks = sum(len(adapter.sites) for adapter in some), sum(adapter.ranks for adapter in some)
        kept = sum(adapter.kept for adapter in some) / ranks
        dense = sum((adapter.dense_cost for adapter in some), Cost())
        cost = sum((adapter.expected_cost for adapter in some), Cost()).over(dense)
        rows.append((kind, len(some), linears, kept, cost.flops, cost.bytes))
    return ("kind", "adapters", "linears", "kept", "flops", "bytes"), rows


def by_adapter(plan: Plan) -> Table:
    """One row per adapter."""
    columns = ("adapter", "kind", "linears", "ranks", "kept", "density", "flops", "bytes", "error")
    return columns, [
        (a.name, a.kind, len(a.sites), a.ranks, a.kept, a.density, a.flops / a.dense_flops, a.bytes / a.dense_bytes, a.error)
        for a in plan.adapters
    ]


def _ratios(plan: Plan) -> dict[str, float]:
    """Expected cost over dense of every adapted linear; the linears of one adapter share its ratio."""
    found: dict[str, float] = {}
    for adapter in plan.adapters:
        ratio = adapter.expected_cost.over(adapter.dense_cost)[plan.metric]
        for site in (*adapter.sites, *adapter.also):
            found.setdefault(site, ratio)
    return found


def _cost(plan: Plan, ratios: dict[str, float], sites: Sequence[SiteRecord], role: str | None) -> float | None:
    """Cost over dense of the sites with that role (None: of all sites); None where there are no such sites."""
    some = [site for site in sites if role in (None, site.role)]
    dense = sum(site.cost(plan.metric) for site in some)
    return sum(site.cost(plan.metric) * ratios.get(site.name, 1.0) for site in some) / dense if dense else None


def _span(layers: Sequence[int | None]) -> str:
    if layers == [None]:
        return "no layer"
    first, last = layers[0], layers[-1]
    return str(first) if first == last else f"{first} to {'no layer' if last is None else last}"
