"""The weights that the adapted model does not read: they may be freed and cannot be trained."""

from __future__ import annotations

from rana_fx.graph.operands import base_name
from rana_fx.plan import Plan


def replaced_weights(plan: Plan) -> frozenset[str]:
    """Weights, by the plan's names, all of whose linears have an adapter that multiplies only by a matrix of its own.

    A weight is not replaced where one of its linears was skipped, where an adapter multiplies by it, masked or exactly, or
    where a note is on it: one of these says that an embedding reads the weight as its table.
    """
    own = {site for adapter in plan.adapters if not adapter.reads_model for site in adapter.sites}
    sites: dict[str, set[str]] = {}
    for record in plan.sites:
        sites.setdefault(base_name(record.name), set()).add(record.name)
    left = {base_name(skip.site) for skip in plan.skips}
    return frozenset(weight for weight, parts in sites.items() if parts <= own and weight not in left)
