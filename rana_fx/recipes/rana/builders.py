"""Operating points as adapters.

In: a unit, its candidates and the operating point chosen. Out: the adapters that replace it: none where it stays dense, one
with a router for the whole unit, or one mask of inputs for each of its linears. Costs and kept ranks are those expected over
the sample. Tensors alias those of the candidates (no copy), on the model's device; ``for_plan`` copies them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.recipes.builders import stack_name
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.candidates import UnitCandidates
from rana_fx.recipes.rana.gptq import Packed
from rana_fx.recipes.rana.operating_point import OperatingPoint
from rana_fx.recipes.rana.quantization import UnitFormat
from rana_fx.recipes.rana.units import Unit


def build(problem: Problem, unit: Unit, candidates: UnitCandidates, point: OperatingPoint) -> list[Adapter]:
    """The adapters of a unit at one of its own operating points; joint candidates make theirs themselves."""
    if point.kind == "dense":
        return []
    stored = candidates.formats[point.format_index]
    if point.kind == "stored":
        return [replace(_neuron(problem, name, None, 0.0, stored), kind="stored") for name in unit]
    if point.kind == "neuron":
        masks = zip(unit, candidates.input_thresholds(point), point.kept_by_site, strict=True)
        return [_neuron(problem, name, tau_I, kept, stored) for name, tau_I, kept in masks]
    return [_rank(problem, unit, candidates, point)]


def for_plan(problem: Problem, adapter: Adapter) -> Adapter:
    """As a plan holds it: on the CPU, in the model's dtype, in memory of its own."""
    made = adapter.on("cpu").to(problem.layout.sites[adapter.sites[0]].weight.dtype)
    owned = {key: value.clone() for key, value in made.tensors().items() if _shared(value)}
    return replace(made, **owned)  # type: ignore[arg-type]


def _rank(problem: Problem, unit: Unit, candidates: UnitCandidates, point: OperatingPoint) -> Adapter:
    components, stored = candidates.components, candidates.formats[point.format_index]
    assert components is not None
    router, factor = components.router_DI[: point.ranks], components.factor_DO[: point.ranks]
    units, threshold = components.units_D[: point.ranks], components.threshold(point)
    tau = threshold * units.square()
    if stored.router or stored.factor:
        # components share scales, with the least error in units of loss
        router, factor = (router / units[:, None]).to(router.dtype), (factor * units[:, None]).to(factor.dtype)
        tau = torch.full_like(tau, threshold)
    packed_router, packed_factor = stored.router_of(router), stored.factor_of(factor)
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
        router_tau=candidates.input_thresholds(point)[0].float() if masked else None,
        router_kept=point.router_kept,
        dense_flops=problem.flops(unit),
        dense_bytes=problem.bytes(unit),
    )
    return made.costed()


def _shared(value: Tensor) -> bool:
    """Whether it is a view of a larger tensor."""
    return value.untyped_storage().nbytes() > value.numel() * value.element_size()


def _neuron(problem: Problem, name: str, tau_I: Tensor | None, kept: float, stored: UnitFormat) -> Adapter:
    """``tau_I``: None: all inputs are kept."""
    site = problem.layout.sites[name]
    packed = stored.weight_of(name, site.matrix()) if stored.weight else None
    made = Adapter(
        name=name,
        kind="neuron",
        sites=(name,),
        ranks=site.in_features,
        kept=float(site.in_features) if tau_I is None else kept,
        tau=torch.zeros(site.in_features, device="cpu") if tau_I is None else tau_I.float(),
        weight=None if packed is None else packed.matrix,
        weight_scale=_scale(packed),
        bias=None if packed is None else problem.bias((name,)),
        dense_flops=problem.flops((name,)),
        dense_bytes=problem.bytes((name,)),
    )
    return made.costed()


def _scale(packed: Packed | None) -> Tensor | None:
    return None if packed is None else packed.scale
