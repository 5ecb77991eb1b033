"""Plans without calibration, for latency benches: adapters with random factors at exactly the target cost.

In: a model, its layout and a budget in bytes. Out: an ordinary ``Plan``, attached, with its thresholds set. Latency depends on
ranks, densities and dtypes, not on the values of factors. Every adapter costs one fraction p of its layers:

    rank    attention inputs over one tensor, stacked; up and gate, stacked (or each alone)
            r = min(p D / (R + density F), D / (R + F), o, i),  k = (p D - r R) / F      router r R + product k F = p D
    neuron  attention output, down, heads and stems where counted; with kinds "neuron" and "apart" all linears   k = p D / F

D: bytes of the dense layers; R: bytes of a row of the router; F: bytes of a row of the factor (or of W^T); scales included. With
16 bits throughout R = 2 i, F = 2 o, D = 2 o i. The second bound on r is the rank above which a batch, which needs every row,
costs more than dense. The router has the scale of U^T W and the rows of A^T have norm one, so activations keep their scale; a W^T
in 8 or 4 bits is the model's weight, quantised. Thresholds are the quantile of v^2 that keeps k of r, measured while the
rewritten model decodes, since the input of a layer depends on the masks of the layers before it.

Hashing the weights of a 7 B model and its factors takes a minute per plan, and these plans are not saved: sites have no weight
digest, the digest of the plan is over its facts and seed, and it is attached without the check of ``attach``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rana_fx.adaptation import CalibratedModel, planned
from rana_fx.adapter import Adapter
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.layout import Layout
from rana_fx.errors import InvalidOption
from rana_fx.evaluation.measure import Meter
from rana_fx.formats import pack
from rana_fx.kernels.cost import weight_bytes
from rana_fx.modules import device_of
from rana_fx.plan import Plan
from rana_fx.recipes import Problem, neuron_adapter, split_budget, stack_name
from rana_fx.runtime import attachment
from rana_fx.runtime.attachment import Factors

_SCALES = torch.bfloat16  # as recipes store them
_ALIGNED = 16  # large ranks are multiples of this
RECIPE = "random"


@dataclass(frozen=True)
class PlanConfig:
    """Kind and storage of the adapters of a random plan.

    kind: "rank" (rank and neuron adapters, as in the paper), "neuron" (input masks only, one for all stacked linears) or "apart"
    (one input mask per linear). density: kept fraction of a router's ranks, unless the bound on ranks is reached. stacked: one
    adapter for gate and up of a block. router_bits, factor_bits: 4, 8, or 16 for the model's dtype; bits of routers, and of
    factors of rank adapters and weights of neuron adapters.
    """

    kind: str = "rank"
    density: float = 0.5
    stacked: bool = True
    router_bits: int = 16
    factor_bits: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InvalidOption(name="density", got=self.density, expected="a number in (0, 1]")
        if self.kind not in ("rank", "neuron", "apart"):
            raise InvalidOption(name="kind", got=self.kind, expected="rank, neuron or apart")
        for name in ("router_bits", "factor_bits"):
            if getattr(self, name) not in (16, 8, 4):
                raise InvalidOption(name=name, got=getattr(self, name), expected="16, 8 or 4")

    @property
    def label(self) -> str:
        """The kind, with bits unless both are 16: "rank", "neuron", "rank:8/16"."""
        return self.kind if self.router_bits == self.factor_bits == 16 else f"{self.kind}:{self.router_bits}/{self.factor_bits}"


def plan_configs(text: str, *, density: float, stacked: bool) -> list[PlanConfig]:
    """Configs from labels separated by commas. Raises InvalidOption."""
    found = []
    for label in text.split(","):
        kind, _, widths = label.strip().partition(":")
        router, _, factor = (widths or "16/16").partition("/")
        if not (router.isdigit() and factor.isdigit()):
            raise InvalidOption(name="menus", got=label, expected="a kind, or kind:router bits/factor bits, such as rank:8/16")
        found.append(PlanConfig(kind=kind, density=density, stacked=stacked, router_bits=int(router), factor_bits=int(factor)))
    return found


def layout_of(model: nn.Module, scope: str = "blocks") -> Layout:
    """The layout of a language model, from one traced call with four tokens. ``scope``: of the budget."""
    ids_BT = torch.arange(4, device=device_of(model)).unsqueeze(0)
    batch = {"input_ids": ids_BT, "use_cache": False}
    return calibrate(model, [batch], wanted=lambda _: set(), capacity=4, scope=scope, progress=False).layout


def random_plan(model: nn.Module, layout: Layout, budget: float, *, config: PlanConfig | None = None, seed: int = 0) -> Plan:
    """A plan whose expected cost in weight bytes is ``budget``, with thresholds of zero; factors on the model's device.

    Raises:
        BudgetUnreachable, InvalidOption.
    """
    config = config or PlanConfig()
    problem = Problem(layout, {}, budget, "bytes", RECIPE, progress=False)
    ranked = layout.stacks()
    for block in layout.blocks:
        ranked += [block.ups] if config.stacked else [(up,) for up in block.ups]
    masked = [site.name for site in layout.sites.values() if site.role == "attention_out"] + [b.down for b in layout.blocks]
    masked += [site.name for site in layout.sites.values() if site.counted and site.outside_blocks]
    adapted = (*(name for names in ranked for name in names), *masked)
    left = split_budget(problem, adapted, why="some linears are neither of attention nor of an MLP block")
    fraction = min(1.0, left.fraction)
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    with torch.no_grad():
        masks = [(name,) for name in masked]
        if config.kind == "apart":
            ranked, masks = [], [(name,) for name in adapted]
        elif config.kind == "neuron":
            ranked, masks = [], [*ranked, *masks]
        adapters = [_rank(problem, names, fraction, config, generator) for names in ranked]
        adapters += [_neuron(problem, names, fraction, config) for names in masks]
    order = {name: index for index, name in enumerate(layout.sites)}
    adapters.sort(key=lambda adapter: order[adapter.sites[0]])
    scope = next(site.scope for site in layout.sites.values())
    calibration = CalibratedModel(type(model).__name__, layout, {}, tokens=0, seed=seed, hashed=False, scope=scope)
    return _with_cheap_digest(planned(calibration, problem, adapters))


def ranks_for(
    out: int, width: int, fraction: float, density: float, *, router_bits: int = 16, factor_bits: int = 16, dense_bits: int = 16
) -> tuple[int, float]:
    """(ranks r, expected kept ranks k) of a rank adapter with ``fraction`` of the bytes of (out, width) in ``dense_bits``.

    Raises:
        InvalidOption: the adapter of full rank with all ranks kept costs less.
    """
    dense = weight_bytes(width, out, dense_bits)
    router, factor = _row_bytes(width, router_bits), _row_bytes(out, factor_bits)
    ranks = min(fraction * dense / (router + density * factor), dense / (router + factor), out, width)
    _check_affordable(fraction, min(out, width) * (router + factor) / dense)
    whole = _ALIGNED if ranks >= 4 * _ALIGNED else 1
    count = max(1, int(ranks) // whole * whole)
    return count, min(float(count), (fraction * dense - count * router) / factor)


def _check_affordable(fraction: float, most: float) -> None:
    """Raises InvalidOption if the most expensive adapter in these bits costs less than the target ``fraction``."""
    if fraction > most * (1 + 1e-9):
        expected = f"at most {most:.3f} of a layer: the cost of full rank in so few bits"
        raise InvalidOption(name="budget", got=f"{fraction:.3f} of each layer", expected=expected)


def attach_unchecked(model: nn.Module, plan: Plan) -> Plan:
    """Attach without hashing weights. Returns the plan with the attached factors as its tensors.

    On a CPU these are copies in huge pages, as ``attach`` makes them; on a GPU, where memory is short, the plan's own.
    """
    attachment.attach_unchecked(model, plan, copy=device_of(model).type == "cpu")
    found = attachment.attached(model)
    assert found is not None
    return live_plan(plan, found.factors)


def live_plan(plan: Plan, factors: Factors) -> Plan:
    """The same plan with the factors attached to a model in place of its own tensors."""
    live = [
        replace(adapter, **{key: getattr(factors, f"a{index}_{key}").detach() for key in adapter.tensors()})
        for index, adapter in enumerate(plan.adapters)
    ]
    found = replace(plan, adapters=tuple(live))
    vars(found)["_digest"] = plan.digest()
    return found


class RecordingMeter(Meter):
    """A meter that also records v^2 of every masked matmul while ``rows`` is a dict."""

    rows: dict[str, list[Tensor]] | None = None

    def reset(self) -> None:
        """Set all counts to zero."""
        self._kept, self._rows = {}, {}

    def _count(self, key: tuple[str, str], v: Tensor, tau: Tensor | None = None) -> None:
        name, part = key
        if self.rows is not None and part == "tau":
            self.rows.setdefault(name, []).append(v.detach().float().square().flatten())
        super()._count(key, v, tau)


def set_thresholds(meter: RecordingMeter, plan: Plan, decode: Callable[[], object], *, rounds: int = 3) -> None:
    """Set every tau of the attached ``plan`` in place, so that the density measured while ``decode`` runs is the expected one.

    The first round keeps everything; each further round measures with the thresholds of the round before.
    """
    for _ in range(rounds):
        meter.rows = {}
        decode()
        for adapter in plan.adapters:
            squares = torch.cat(meter.rows[adapter.name])
            kept = round(adapter.density * squares.numel())
            adapter.tau.fill_(squares.kthvalue(squares.numel() - kept + 1).values if kept else float("inf"))
    meter.rows = None
    meter.reset()


def _rank(problem: Problem, names: tuple[str, ...], fraction: float, config: PlanConfig, generator: torch.Generator) -> Adapter:
    sites = [problem.layout.sites[name] for name in names]
    weight = sites[0].weight
    out, width = sum(site.out_features for site in sites), sites[0].in_features
    bits = {"router_bits": _floating(config.router_bits, weight), "factor_bits": _floating(config.factor_bits, weight)}
    ranks, kept = ranks_for(out, width, fraction, config.density, **bits, dense_bits=8 * weight.element_size())

    def normal(rows: int, columns: int, scale: float, bits: int) -> tuple[Tensor, Tensor | None]:
        made = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
        return _stored(made.normal_(0, scale, generator=generator), bits)

    # the min(out, width) rows of U^T W have the energy of W, out * width * std^2
    std = float(torch.stack([site.view.float().std() for site in sites]).mean())
    bias = problem.bias(names)
    router, router_scale = normal(ranks, width, std * (out / min(out, width)) ** 0.5, config.router_bits)
    factor, factor_scale = normal(ranks, out, out**-0.5, config.factor_bits)
    adapter = Adapter(
        name=stack_name(names),
        kind="rank",
        sites=names,
        ranks=ranks,
        kept=kept,
        tau=torch.zeros(ranks, device=weight.device),
        router=router,
        router_scale=router_scale,
        weight=factor,
        weight_scale=factor_scale,
        bias=None if bias is None else bias.to(weight.dtype),
        dense_flops=problem.flops(names),
        dense_bytes=problem.bytes(names),
    )
    return adapter.costed()


def _neuron(problem: Problem, names: tuple[str, ...], fraction: float, config: PlanConfig) -> Adapter:
    site = problem.layout.sites[names[0]]
    zeros = torch.zeros(site.in_features, device=site.weight.device)
    made = replace(neuron_adapter(problem, names[0], 0.0, torch.ones_like(zeros), fraction), tau=zeros)
    if config.factor_bits == 16 and len(names) == 1:
        return made
    out = sum(problem.layout.sites[name].out_features for name in names)
    row, bias = _row_bytes(out, _floating(config.factor_bits, site.weight)), problem.bias(names)
    kept = fraction * problem.bytes(names) / site.uses / row
    _check_affordable(fraction, fraction * site.in_features / kept)
    factor, scale = _stored(torch.cat([problem.layout.sites[name].view for name in names]).t().contiguous(), config.factor_bits)
    own = replace(
        made,
        name=stack_name(names),
        sites=names,
        weight=factor,
        weight_scale=scale,
        bias=None if bias is None else bias.to(site.weight.dtype),
        kept=min(kept, float(site.in_features)),
        dense_flops=problem.flops(names),
        dense_bytes=problem.bytes(names),
    )
    return own.costed()


def _row_bytes(columns: int, bits: int) -> float:
    """Of a row as ``_stored`` stores it."""
    return weight_bytes(1, columns, bits, scale_bytes=_SCALES.itemsize)


def _stored(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    return (matrix, None) if bits == 16 else pack(matrix.contiguous(), bits, scale_dtype=_SCALES)


def _floating(bits: int, weight: Tensor) -> int:
    """Actual bits: 16 represents the dtype of the model's weights."""
    return 8 * weight.element_size() if bits == 16 else bits


def _with_cheap_digest(plan: Plan) -> Plan:
    """Set the digest of the facts only, which determine the random factors."""
    vars(plan)["_digest"] = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
    return plan
