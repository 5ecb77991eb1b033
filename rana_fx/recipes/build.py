"""Points of a menu as adapters.

In: a unit, its menu and the point chosen. Out: the adapters that replace it: none where it stays dense, one with a router for the
whole unit, or one mask of inputs for each of its linears. Costs and kept ranks are those expected over the sample.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rana_fx.adapters import Adapter
from rana_fx.recipes.allocate import Unit
from rana_fx.recipes.menu import Menu, Point, SiteMask
from rana_fx.recipes.problem import Problem, stack_name
from rana_fx.recipes.rounding import Packed


def build(problem: Problem, unit: Unit, menu: Menu, point: Point) -> list[Adapter]:
    if point.kind == "dense":
        return []
    storage = menu.storages[point.storage]
    if point.kind == "stored":
        return [_stored(problem, name, storage.weights[name]) for name in unit]
    if point.kind == "neuron":
        return [_neuron(problem, name, mask, storage.weights.get(name)) for name, mask in zip(unit, point.sites, strict=True)]
    assert menu.basis is not None
    router, factor = menu.basis.b_DI[: point.ranks], menu.basis.a_OD[:, : point.ranks].t()
    # behind a mask it lies input-major
    router = router if point.router_tau_I is None else router.t()
    packed_router = None if storage.router is None else storage.router.columns(point.ranks)
    packed_factor = None if storage.factor is None else storage.factor.rows(point.ranks)
    made = Adapter(
        name=stack_name(unit),
        kind="static" if point.kind == "static" else "rank",
        sites=unit,
        ranks=point.ranks,
        kept=point.kept,
        tau=torch.full((point.ranks,), point.tau, dtype=torch.float32),
        router=router if packed_router is None else packed_router.matrix,
        router_scale=None if packed_router is None else packed_router.scale,
        weight=factor if packed_factor is None else packed_factor.matrix,
        weight_scale=None if packed_factor is None else packed_factor.scale,
        bias=problem.bias(unit),
        router_tau=None if point.router_tau_I is None else point.router_tau_I.float(),
        router_kept=point.router_kept,
        dense_flops=problem.flops(unit),
        dense_bytes=problem.bytes(unit),
    )
    return [made.to(problem.layout.sites[unit[0]].weight.dtype).on("cpu").costed()]


def _neuron(problem: Problem, name: str, mask: SiteMask, packed: Packed | None) -> Adapter:
    site = problem.layout.sites[name]
    made = Adapter(
        name=name,
        kind="neuron",
        sites=(name,),
        ranks=site.in_features,
        kept=mask.kept,
        tau=mask.tau_I.float(),
        weight=None if packed is None else packed.matrix,
        weight_scale=None if packed is None else packed.scale,
        bias=None if packed is None else problem.bias((name,)),
        dense_flops=problem.flops((name,)),
        dense_bytes=problem.bytes((name,)),
    )
    return made.to(site.weight.dtype).on("cpu").costed()


def _stored(problem: Problem, name: str, packed: Packed) -> Adapter:
    every = SiteMask(torch.zeros(problem.layout.sites[name].in_features), float(problem.layout.sites[name].in_features))
    return replace(_neuron(problem, name, every, packed), kind="stored")
