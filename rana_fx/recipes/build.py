"""Points of a menu as adapters.

In: a unit, its menu and the point chosen. Out: the adapters that replace it: none where it stays dense, one with a router for the
whole unit, or one mask of inputs for each of its linears. Costs and kept ranks are those expected over the sample.
"""

from __future__ import annotations

import torch

from rana_fx.adapters import Adapter
from rana_fx.recipes.allocate import Unit
from rana_fx.recipes.menu import Menu, Point, SiteMask
from rana_fx.recipes.problem import Problem, stack_name


def build(problem: Problem, unit: Unit, menu: Menu, point: Point) -> list[Adapter]:
    if point.kind == "dense":
        return []
    if point.kind == "neuron":
        return [_neuron(problem, name, mask) for name, mask in zip(unit, point.sites, strict=True)]
    assert menu.basis is not None
    router = menu.basis.b_DI[: point.ranks]
    made = Adapter(
        name=stack_name(unit),
        kind="static" if point.kind == "static" else "rank",
        sites=unit,
        ranks=point.ranks,
        kept=point.kept,
        tau=torch.full((point.ranks,), point.tau, dtype=torch.float32),
        # behind a mask it lies input-major
        router=router if point.router_tau_I is None else router.t(),
        weight=menu.basis.a_OD[:, : point.ranks].t(),
        bias=problem.bias(unit),
        router_tau=None if point.router_tau_I is None else point.router_tau_I.float(),
        router_kept=point.router_kept,
        dense_flops=problem.flops(unit),
        dense_bytes=problem.bytes(unit),
    )
    return [made.to(problem.layout.sites[unit[0]].weight.dtype).on("cpu").costed()]


def _neuron(problem: Problem, name: str, mask: SiteMask) -> Adapter:
    site = problem.layout.sites[name]
    share = mask.kept / site.in_features
    return Adapter(
        name=name,
        kind="neuron",
        sites=(name,),
        ranks=site.in_features,
        kept=mask.kept,
        tau=mask.tau_I.float().cpu(),
        flops=share * site.flops,
        dense_flops=site.flops,
        bytes=share * problem.bytes((name,)),
        dense_bytes=problem.bytes((name,)),
    )
