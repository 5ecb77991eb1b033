"""Units: linears that read one tensor, stacked, so that they share a router or a mask of their input."""

from __future__ import annotations

from rana_fx.calibration.layout import Layout
from rana_fx.calibration.sensitivity import Unit

__all__ = ["Unit", "has_basis", "shape_of_unit", "units_of"]


def units_of(layout: Layout, *, shared: bool = True) -> list[Unit]:
    """Sites of the budget that read one tensor equally often, stacked; unless ``shared``, each by itself."""
    found: dict[tuple[int, int, str], list[str]] = {}
    for site in layout.sites.values():
        if site.counted:
            found.setdefault((site.group, site.uses, "" if shared else site.name), []).append(site.name)
    return [tuple(names) for names in found.values()]


def shape_of_unit(layout: Layout, unit: Unit) -> tuple[int, int]:
    """(outputs, inputs)."""
    return sum(layout.sites[name].out_features for name in unit), layout.sites[unit[0]].in_features


def has_basis(out: int, width: int) -> bool:
    """Whether a unit of this shape has components: a router as tall as half of the layer's width saves nothing."""
    return out > width // 2
