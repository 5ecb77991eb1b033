"""Semantic checks of a plan that was read from a file: numbers, names and tensors that a recipe can produce.

In: a plan, and the names of the tensors in its file. Out: nothing, or a ValueError that names the place and the fault. The digest
detects files that were changed; these checks detect invalid plans whose digest is correct.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rana_fx.adapter import MATRICES, Adapter
from rana_fx.cost import METRICS, SCOPES

# defined in rana_fx.graph.roles
ROLES = ("attention_in", "attention_out", "up", "down", "router", "other", "constant", "head", "stem")
_LARGEST = 2**48  # bound of sizes and counts: above it, products are not exact in floating point and no machine holds the tensor
_THRESHOLDS = ("tau", "router_tau", "exact_tau")


def check(plan: Any, tensors: Iterable[str]) -> None:
    """Check a ``rana_fx.plan.Plan``. ``tensors``: the names of all tensors in its file. Raises ValueError."""
    _expect(plan.metric in METRICS, f"metric {plan.metric!r} is none of {', '.join(METRICS)}")
    _expect(plan.scope in SCOPES, f"scope {plan.scope!r} is none of {', '.join(SCOPES)}")
    _expect(0 < plan.budget < math.inf, f"budget {plan.budget} is no positive number")
    _expect(0 <= plan.tokens <= _LARGEST, f"{plan.tokens} calibration tokens")
    if plan.curve is not None:
        plan.curve.check(_expect)
    _unique("linear", [site.name for site in plan.sites])
    for site in plan.sites:
        _check_site(site)
    _unique("adapter", [adapter.name for adapter in plan.adapters])
    _unique("replaced linear", [site for adapter in plan.adapters for site in adapter.sites])
    names = {site.name for site in plan.sites}
    for adapter in plan.adapters:
        _check_facts(adapter, names)
        for key, value in adapter.tensors().items():
            _check_tensor(f"{adapter.name}: {key}", key, value)
    used = {f"{index}.{key}" for index, adapter in enumerate(plan.adapters) for key in adapter.tensors()}
    extra = sorted(set(tensors) - used)
    _expect(not extra, f"there are tensors that no adapter has: {', '.join(extra[:4])}")


def _check_site(site: Any) -> None:
    _expect(site.role in ROLES, f"{site.name}: role {site.role!r} is none of {', '.join(ROLES)}")
    sizes = (site.out_features, site.in_features, site.uses)
    _expect(all(0 < size <= _LARGEST for size in sizes), f"{site.name}: sizes and uses {sizes}")
    dtype = getattr(torch, site.dtype, None)
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    _expect(floating, f"{site.name}: dtype {site.dtype!r} is no floating dtype of torch")


def _check_facts(adapter: Adapter, names: set[str]) -> None:
    name = adapter.name
    _unique(f"linear of {name}", [*adapter.sites, *adapter.also])
    if adapter.gate is not None:
        _expect(adapter.kind == "gated", f"{name}: a {adapter.kind} adapter has a gate")
        _expect(adapter.gate in names, f"{name}: its gate {adapter.gate} is not among the linears")
    costs = (adapter.flops, adapter.dense_flops, adapter.bytes, adapter.dense_bytes)
    _expect(all(0 <= cost < math.inf for cost in costs), f"{name}: costs {costs}")
    _expect(adapter.error is None or not adapter.error < 0, f"{name}: error {adapter.error}")
    for key, limit in (("kept", adapter.ranks), ("router_kept", adapter.width), ("exact_kept", adapter.out)):
        kept = getattr(adapter, key)
        _expect(kept is None or (limit is not None and 0 <= kept <= limit), f"{name}: {key} {kept} of {limit}")


def _check_tensor(name: str, key: str, value: Tensor) -> None:
    if not value.is_floating_point():
        return
    if key in _THRESHOLDS:
        # infinity is valid: never kept
        _expect(not bool(value.isnan().any()), f"{name} has thresholds that are NaN")
        _expect(key == "exact_tau" or bool((value >= 0).all()), f"{name} has negative thresholds: a square is never below zero")
        return
    # formats that pack finite numbers have finite scales
    what = "numbers" if key in (*MATRICES, "bias", "shift") else "scales"
    _expect(bool(value.isfinite().all()), f"{name} has {what} that are NaN or infinite")


def _unique(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        _expect(name not in seen, f"{what} {name} is there twice")
        seen.add(name)


def _expect(right: bool, reason: str) -> None:
    if not right:
        raise ValueError(reason)
