"""The records of a plan's linears by the names of weights, and the check that a weight is the one that a record was made for.

In: the plan's record of a linear and the weight of that name in a model. Out: nothing, or an error that names the difference.
"""

from __future__ import annotations

from torch import nn

from rana_fx.dense_memory import is_freed
from rana_fx.errors import PlanMismatch, WeightsFreed
from rana_fx.graph.operands import base_name
from rana_fx.ordinary import has_data
from rana_fx.plan import Plan, SiteRecord, weight_digest
from rana_fx.runtime.changed_weights import not_ordinary


def check_fit(model: nn.Module, record: SiteRecord, weight: nn.Parameter | None) -> None:
    """Compare shape, dtype and digest of a weight with the record.

    Raises:
        PlanMismatch: the weight is missing, wrapped, without data or a different one. WeightsFreed: its memory was freed.
    """
    name = type(model).__name__
    if weight is not None and not has_data(weight):
        raise not_ordinary(name, record.name, weight, record.dtype)
    if weight is None:
        raise PlanMismatch(model=name, site=record.name, got="no such weight", expected=f"a weight of a {record.op}")
    shape = (record.in_features, record.out_features) if record.transposed else (record.out_features, record.in_features)
    part = weight.dim() != 2 or base_name(record.name) != record.name
    if tuple(weight.shape) != shape and not part:  # a part of a weight is checked by the digest of the whole weight
        raise PlanMismatch(model=name, site=record.name, got=f"shape {tuple(weight.shape)}", expected=f"shape {shape}")
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype != record.dtype:
        raise PlanMismatch(
            model=name,
            site=record.name,
            got=f"dtype {dtype}",
            expected=f"dtype {record.dtype} (load it with dtype=torch.{record.dtype})",
        )
    if is_freed(weight):
        raise WeightsFreed(site=record.name, what="attach a plan")
    if weight_digest(weight) != record.digest:
        raise PlanMismatch(model=name, site=record.name, got="other weights", expected=f"weights with digest {record.digest}")


def records_of(plan: Plan) -> dict[str, SiteRecord]:
    """The records of a plan by the names of weights, in the plan's order; of sites that are parts of one weight, the first."""
    found: dict[str, SiteRecord] = {}
    for record in plan.sites:
        found.setdefault(base_name(record.name), record)
    return found
