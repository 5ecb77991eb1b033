"""A plan as lines of text: its adapters by kind and role, by role alone, or one by one, and its remarks.

In: adapters, the roles of the sites they replace, and the dense cost of the whole plan. Out: lines of text; by kind and role a
header and at most ``MOST_GROUPS`` + 1 lines for a model of any depth, by role alone at most ``MOST_ROLES`` + 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rana_fx.skips import Note, Skip

if TYPE_CHECKING:
    from rana_fx.adapter import Adapter
    from rana_fx.cost import Cost

MOST_GROUPS = 18  # current recipes make fewer combinations of kind and role
MOST_ROLES = 5
COLUMNS = 80  # of a terminal


def by_role(adapters: Sequence[Adapter], roles: Mapping[str, str], metric: str, dense: Cost) -> list[str]:
    """A line for each kind of adapter and role: how many, in which layers, kept fractions and cost in ``metric``.

    Args:
        roles: by site. dense: of all linears in the budget, of which the last column is a share.
    """
    groups: dict[tuple[str, str], list[Adapter]] = {}
    for adapter in adapters:
        role = "+".join(dict.fromkeys(roles.get(site, "?") for site in adapter.sites))
        groups.setdefault((adapter.kind, role), []).append(adapter)
    ordered = sorted(groups.items(), key=lambda item: -sum(adapter.dense_cost[metric] for adapter in item[1]))
    rows = [_row(kind, role, found, metric, dense) for (kind, role), found in ordered[:MOST_GROUPS]]
    rest = [adapter for _, found in ordered[MOST_GROUPS:] for adapter in found]
    if rest:
        rows.append(_row("other", f"{len(ordered) - MOST_GROUPS} groups", rest, metric, dense))
    if not rows:
        return []
    header = ("kind", "role", "adapters", "layers", "kept (least to most)", f"{metric} over dense", "share of all")
    return aligned(header, rows)


def by_role_alone(adapters: Sequence[Adapter], roles: Mapping[str, str], metric: str) -> list[str]:
    """A line for each role, the costliest first: how many of its linears are adapted, in which layers, their cost over dense."""
    groups: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        role = "+".join(dict.fromkeys(roles.get(site, "?") for site in adapter.sites))
        groups.setdefault(role, []).append(adapter)
    ordered = sorted(groups.items(), key=lambda item: -sum(adapter.dense_cost[metric] for adapter in item[1]))
    rest = [adapter for _, found in ordered[MOST_ROLES:] for adapter in found]
    ordered = ordered[:MOST_ROLES] + ([(f"{len(ordered) - MOST_ROLES} more roles", rest)] if rest else [])
    rows = []
    for role, found in ordered:
        cost, whole = (sum(getattr(adapter, part)[metric] for adapter in found) for part in ("expected_cost", "dense_cost"))
        linears = sum(len(adapter.sites) for adapter in found)
        rows.append((role.replace("_", " "), str(linears), layers_of(found), f"{cost / whole:.3f}" if whole else "-"))
    return aligned(("role", "linears", "layers", f"{metric} over dense"), rows) if rows else []


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A header and rows of text in columns, indented by two."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)
    ]


def remarks_in_short(entries: Sequence[Skip | Note], *, most: int = 3) -> list[str]:
    """The number of remarks, and the first ``most`` of them, those on the whole plan first; no line where there are none."""
    notes = sorted((entry for entry in entries if isinstance(entry, Note)), key=lambda note: note.site != "")
    if not notes:
        return []
    count = f"{len(notes)} remark{'s' if len(notes) > 1 else ''}"
    first = "" if len(notes) <= most else ", the first" if most == 1 else f", the first {most}"
    return [
        f"  {count}{first}:",
        *(f"    {note.site}: {note.text}" if note.site else f"    {note.text}" for note in notes[:most]),
    ]


def shortened(line: str, columns: int = COLUMNS) -> str:
    """A line that fits, its end replaced by dots where it does not."""
    return line if len(line) <= columns else line[: columns - 3] + "..."


def one_by_one(adapters: Sequence[Adapter]) -> list[str]:
    """A line for each adapter."""
    lines = []
    for adapter in adapters:
        error = "" if adapter.error is None else f", error {adapter.error:.4f}"
        lines.append(f"  {adapter.name}: {adapter.kind}, {adapter.kept:.1f} of {adapter.ranks} kept{details(adapter)}{error}")
    return lines


def details(adapter: Adapter) -> str:
    """Storage of its matrices, inputs that its router reads and number of exact outputs, as text: ", router 8 bit, ..."."""
    names = {"router": "router", "weight": "factors" if adapter.router is not None else "weights"}
    parts = [f"{names[key]} {bits} bit" for key, bits in adapter.bits().items()]
    if adapter.router_kept is not None:
        parts.insert(1, f"which reads {adapter.router_kept:.1f} of {adapter.width} inputs")
    if adapter.exact_kept is not None:
        parts.append(f"{adapter.exact_kept:.1f} of {adapter.out} outputs exact")
    return "".join(f", {part}" for part in parts)


def _row(kind: str, role: str, found: Sequence[Adapter], metric: str, dense: Cost) -> tuple[str, ...]:
    kept = [adapter.density for adapter in found]
    cost, whole = (sum(getattr(adapter, part)[metric] for adapter in found) for part in ("expected_cost", "dense_cost"))
    spread = f"{sum(kept) / len(kept):.3f}" + (f" ({min(kept):.3f} to {max(kept):.3f})" if len(found) > 1 else "")
    over = f"{cost / whole:.3f}" if whole else "-"
    share = f"{cost / dense[metric]:.3f}" if dense[metric] else "-"
    return kind, role, str(len(found)), layers_of(found), spread, over, share


def layer_of(site: str) -> int | None:
    """The first number in a linear's name, as ``nn.ModuleList`` gives it; None where there is none."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site)
    return None if number is None else int(number.group(1))


def layers_of(found: Sequence[Adapter]) -> str:
    """The range of layer numbers of adapters: "0 to 31"; "-" where no name has one."""
    layers = sorted({layer for adapter in found if (layer := layer_of(adapter.sites[0])) is not None})
    if not layers:
        return "-"
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
