"""A plan for a random model: made by a recipe, or of adapters of any kind and storage with random masks.

In: a model and its spec. Out: a ``Plan``. Thresholds of random masks are zero and infinity: the kept ranks do not depend on
rounding, so that a wrong mask is detected in any dtype. Thresholds of recipes are inside the range of the compared values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rana_fx
from bench.fuzz.spec import Spec
from rana_fx.adaptation import calibrated, planned
from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout, MlpBlock, Site
from rana_fx.formats import pack
from rana_fx.plan import Plan
from rana_fx.recipes import RECIPES, Problem, gated_adapter, stack_name


def plan_for(model: nn.Module, spec: Spec, batches: list[tuple[Tensor, ...]]) -> Plan:
    """The plan, not attached. Raises what ``rana_fx.adapt`` raises."""
    if spec.plan != "drawn":
        plan = rana_fx.adapt(model, batches, budget=spec.budget, recipe=spec.plan, progress=False, seed=spec.seed)
        rana_fx.detach(model)
        return plan
    calibration = calibrated(model, batches[:1], RECIPES["dense"])
    problem = calibration.problem(budget=1.0, metric="flops", recipe="drawn")
    with torch.no_grad():
        return planned(calibration, problem, _adapters(problem, spec))


def _adapters(problem: Problem, spec: Spec) -> list[Adapter]:
    generator = torch.Generator().manual_seed(spec.seed)
    layout, made = problem.layout, list[Adapter]()
    gates = {block.down: block for block in layout.blocks if block.activation is not None}
    for index, names in enumerate(_groups(layout)):
        kind = spec.kinds[index % len(spec.kinds)]
        sites = [layout.sites[name] for name in names]
        if kind == "gated":
            block = gates.get(names[0])
            if block is None:
                continue
            made.append(_gated(problem, block, spec.density, generator))
        elif kind in ("neuron", "exact"):  # these read the model's own weight: one adapter for each linear
            made += [_adapter(problem, [site], kind, spec, generator) for site in sites]
        elif kind != "dense":
            made.append(_adapter(problem, sites, kind, spec, generator))
    return made


def _groups(layout: Layout) -> list[tuple[str, ...]]:
    """Linears that share an adapter: stacks of attention, ups of MLPs, and every other counted linear by itself."""
    found = [*layout.stacks(), *(block.ups for block in layout.blocks)]
    stacked = {name for names in found for name in names}
    found = [names for names in found if all(layout.sites[name].counted for name in names)]
    return found + [(name,) for name, site in layout.sites.items() if site.counted and name not in stacked]


def _mask(length: int, density: float, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(length, generator=generator) < density, 0.0, float("inf"))


def _gated(problem: Problem, block: MlpBlock, density: float, generator: torch.Generator) -> Adapter:
    neurons = problem.layout.sites[block.down].in_features
    if len(block.ups) == 2:
        return gated_adapter(problem, block, _mask(neurons, density, generator), density * neurons)
    names = (block.down,)
    return Adapter(
        name=block.down, kind="gated", sites=names, ranks=neurons, kept=density * neurons, gate=block.ups[0],
        tau=_mask(neurons, density, generator), dense_flops=problem.flops(names), dense_bytes=problem.bytes(names),
    ).costed()  # fmt: skip


def _adapter(problem: Problem, sites: list[Site], kind: str, spec: Spec, generator: torch.Generator) -> Adapter:
    names = tuple(site.name for site in sites)
    matrix = torch.cat([site.matrix() for site in sites]).double().cpu()  # adapters are made on the CPU, as random numbers are
    dtype = sites[0].weight.dtype
    bias = problem.bias(names)
    bias = None if bias is None else bias.cpu()
    fields: dict[str, object] = {}
    if kind in ("rank", "static", "hybrid", "exact"):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        router, weight, rows = s[:, None] * vh, u.t(), len(s)
        if kind == "hybrid":
            fields["router_tau"] = _mask(matrix.shape[1], spec.density, generator)
            fields["router_kept"] = spec.density * matrix.shape[1]
            router = router.t()
        fields["router"], fields["router_scale"] = _stored(router, spec.router_bits, dtype)
        if kind == "exact":
            fields["exact_tau"] = torch.where(torch.rand(matrix.shape[0], generator=generator) < 0.5, -torch.inf, torch.inf)
            fields["exact_kept"] = matrix.shape[0] / 2
    else:
        weight, rows = matrix.t(), matrix.shape[1]
    stored_kind = {"hybrid": "rank", "exact": "rank", "own": "neuron"}.get(kind, kind)
    tau = torch.zeros(rows) if kind in ("static", "stored") else _mask(rows, spec.density, generator)
    own: Tensor | None = None
    if kind != "neuron":
        own, fields["weight_scale"] = _stored(weight, spec.bits, dtype)
    if spec.shift and kind != "exact":
        fields["shift"] = 0.3 * torch.randn(rows, generator=generator).to(dtype)
        left_out = fields["shift"].double() @ weight  # type: ignore[attr-defined]
        bias = left_out if bias is None else bias.double() + left_out
    return Adapter(
        name=stack_name(names), kind=stored_kind, sites=names, ranks=rows, kept=float((tau == 0).sum()), tau=tau, weight=own,
        bias=None if bias is None else bias.to(dtype), dense_flops=problem.flops(names), dense_bytes=problem.bytes(names),
        **fields,
    ).costed()  # type: ignore[arg-type]  # fmt: skip


def _stored(matrix: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(matrix, scale) in the given number of bits; 8 instead of 4 for an odd number of columns, which 4 bits cannot pack."""
    if bits == 16:
        return matrix.to(dtype).contiguous(), None
    return pack(matrix.float().contiguous(), 8 if matrix.shape[1] % 2 else bits)
