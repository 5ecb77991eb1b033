"""Points of a menu as adapters.

In: a unit, its menu and the point chosen. Out: the adapters that replace it: none where it stays dense, one with a router for the
whole unit, one mask of inputs for each of its linears, or what a cut makes of the unit (cut.py). Costs and kept ranks are those
expected over the sample. Tensors are views of the menu's, on the model's device: a plan gets copies of its own (``settled``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.recipes.builders import stack_name
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.candidates import Menu
from rana_fx.recipes.rana.gptq import Packed
from rana_fx.recipes.rana.operating_point import CUTS, Point, Unit
from rana_fx.recipes.rana.quantization import Storage


def build(problem: Problem, unit: Unit, menu: Menu, point: Point) -> list[Adapter]:
    if point.kind == "dense":
        return []
    if point.kind in CUTS:
        assert menu.cut is not None
        return menu.cut.cut.adapters(unit, point)
    storage = menu.storages[point.storage]
    if point.kind == "stored":
        return [replace(_neuron(problem, name, None, 0.0, storage), kind="stored") for name in unit]
    if point.kind == "neuron":
        masks = zip(unit, menu.bars(point), point.parts, strict=True)
        return [_neuron(problem, name, tau_I, kept, storage) for name, tau_I, kept in masks]
    assert menu.router_DI is not None and menu.factor_DO is not None
    router, factor, units = menu.router_DI[: point.ranks], menu.factor_DO[: point.ranks], menu.units_D[: point.ranks]
    tau = menu.bar(point) * units.square()
    if storage.router or storage.factor:
        # components share scales, which they do best in units of loss
        router, factor = (router / units[:, None]).to(router.dtype), (factor * units[:, None]).to(factor.dtype)
        tau = torch.full_like(tau, menu.bar(point))
    packed_router, packed_factor = storage.router_of(router), storage.factor_of(factor)
    masked = point.router_kept is not None
    made = Adapter(
        name=stack_name(unit),
        kind="static" if point.kind == "static" else "rank",
        sites=unit,
        ranks=point.ranks,
        kept=point.kept,
        tau=tau,
        # behind a mask it lies input-major
        router=packed_router.matrix if packed_router else router.t() if masked else router,
        router_scale=_scale(packed_router),
        weight=factor if packed_factor is None else packed_factor.matrix,
        weight_scale=_scale(packed_factor),
        bias=problem.bias(unit),
        router_tau=menu.bars(point)[0].float() if masked else None,
        router_kept=point.router_kept,
        dense_flops=problem.flops(unit),
        dense_bytes=problem.bytes(unit),
    )
    return [made.costed()]


def settled(problem: Problem, adapter: Adapter) -> Adapter:
    """As a plan holds it: on the CPU, in the model's dtype, with memory of its own."""
    made = adapter.on("cpu").to(problem.layout.sites[adapter.sites[0]].weight.dtype)
    owned = {key: value.clone() for key, value in made.tensors().items() if _shared(value)}
    return replace(made, **owned)  # type: ignore[arg-type]


def _shared(value: Tensor) -> bool:
    """Whether it is a part of something larger."""
    return value.untyped_storage().nbytes() > value.numel() * value.element_size()


def _neuron(problem: Problem, name: str, tau_I: Tensor | None, kept: float, storage: Storage) -> Adapter:
    """``tau_I``: None: it keeps all inputs."""
    site = problem.layout.sites[name]
    packed = storage.weight_of(name, site.matrix()) if storage.weight else None
    made = Adapter(
        name=name,
        kind="neuron",
        sites=(name,),
        ranks=site.in_features,
        kept=float(site.in_features) if tau_I is None else kept,
        tau=torch.zeros(site.in_features) if tau_I is None else tau_I.float(),
        weight=None if packed is None else packed.matrix,
        weight_scale=_scale(packed),
        bias=None if packed is None else problem.bias((name,)),
        dense_flops=problem.flops((name,)),
        dense_bytes=problem.bytes((name,)),
    )
    return made.costed()


def _scale(packed: Packed | None) -> Tensor | None:
    return None if packed is None else packed.scale
