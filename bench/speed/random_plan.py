"""Plans without calibration: adapters of the config with random factors, and exactly the cost that was asked.

In: a model, its layout and a budget in bytes. Out: a ``Plan`` like any other, on the model, with its thresholds set. A latency
bench depends on ranks, densities and dtypes, not on what the factors mean. Every adapter costs one fraction p of its layers:

    rank    attention inputs over one tensor, stacked; up and gate, stacked (or each alone)
            r = min(p D / (R + density F), D / (R + F), o, i),  k = (p D - r R) / F      router r R + product k F = p D
    neuron  attention output, down; of a config of masks alone all of these, stacked or apart k = p D / F

D are the bytes of the dense layers, R those of a router's row and F those of a row of the factors (or of W^T), scales included;
in 16 bits all round R = 2 i, F = 2 o, D = 2 o i. The second bound on r is the cap above which a batch, which needs every row,
costs more than dense. The router has the scale of U^T W, and the rows of A^T have length one, so activations stay what they were;
a W^T in 8 or 4 bits is the model's, rounded. Thresholds are the quantile of v^2 that keeps k of r, seen while the rewritten model
decodes: what a layer reads depends on what the layers before it kept.

Hashing the weights of a 7 B model and again its factors takes a minute a plan, and nobody will load this plan: sites have no
digest of their weight, the plan's digest is over its facts and seed, and it is attached without the check ``attach`` makes.
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

_ALIGNED = 16  # ranks come in whole tiles where there are many
RECIPE = "random"


@dataclass(frozen=True)
class PlanConfig:
    """How a budget is spent.

    kind: "rank", or "neuron" for masks of the input alone, one for all linears stacked, or "apart" for one each. density:
    fraction of a router's ranks that is kept, where the cap on ranks allows it. stacked: one adapter for all up projections of a
    block. router_bits, factor_bits: 8 or 4, or 16 for the model's dtype, of routers and of what is behind the masks: the factors
    of rank adapters and the weights of neuron adapters.
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
        """Short, for tables: "rank", "neuron", "rank:8/16"."""
        return self.kind if self.router_bits == self.factor_bits == 16 else f"{self.kind}:{self.router_bits}/{self.factor_bits}"


def plan_configs(text: str, *, density: float, stacked: bool) -> list[PlanConfig]:
    """Of labels by commas. Raises InvalidOption."""
    found = []
    for label in text.split(","):
        kind, _, widths = label.strip().partition(":")
        router, _, factor = (widths or "16/16").partition("/")
        if not (router.isdigit() and factor.isdigit()):
            raise InvalidOption(name="menus", got=label, expected="a kind, or kind:router bits/factor bits, such as rank:8/16")
        found.append(PlanConfig(kind=kind, density=density, stacked=stacked, router_bits=int(router), factor_bits=int(factor)))
    return found


def layout_of(model: nn.Module) -> Layout:
    """Sites, stacks and blocks of a language model, from one traced call on four tokens."""
    ids_BT = torch.arange(4, device=device_of(model)).unsqueeze(0)
    batch = {"input_ids": ids_BT, "use_cache": False}
    return calibrate(model, [batch], wanted=lambda _: set(), capacity=4, progress=False).layout


def random_plan(model: nn.Module, layout: Layout, budget: float, *, config: PlanConfig | None = None, seed: int = 0) -> Plan:
    """A plan whose expected cost in weight bytes is ``budget``, thresholds still zero; factors on the model's device.

    Raises:
        BudgetUnreachable, InvalidOption.
    """
    config = config or PlanConfig()
    problem = Problem(layout, {}, budget, "bytes", RECIPE, progress=False)
    ranked = layout.stacks()
    for block in layout.blocks:
        ranked += [block.ups] if config.stacked else [(up,) for up in block.ups]
    masked = [site.name for site in layout.sites.values() if site.role == "attention_out"] + [b.down for b in layout.blocks]
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
    calibration = CalibratedModel(type(model).__name__, layout, {}, tokens=0, seed=seed, hashed=False)
    return _with_cheap_digest(planned(calibration, problem, adapters))


def ranks_for(
    out: int, width: int, fraction: float, density: float, *, router_bits: int = 16, factor_bits: int = 16, dense_bits: int = 16
) -> tuple[int, float]:
    """(ranks r, expected kept k) of a rank adapter that costs ``fraction`` of the bytes of (out, width) in ``dense_bits``.

    Raises:
        InvalidOption: full ranks, all kept, cost less.
    """
    dense = weight_bytes(width, out, dense_bits)
    router, factor = weight_bytes(1, width, router_bits), weight_bytes(1, out, factor_bits)
    ranks = min(fraction * dense / (router + density * factor), dense / (router + factor), out, width)
    _check_affordable(fraction, min(out, width) * (router + factor) / dense)
    whole = _ALIGNED if ranks >= 4 * _ALIGNED else 1
    count = max(1, int(ranks) // whole * whole)
    return count, min(float(count), (fraction * dense - count * router) / factor)


def _check_affordable(fraction: float, most: float) -> None:
    """Raises InvalidOption where a layer cannot cost what it shall: all of it, in few bits, costs less."""
    if fraction > most * (1 + 1e-9):
        expected = f"at most {most:.3f} of a layer, which is what all of it costs in so few bits"
        raise InvalidOption(name="budget", got=f"{fraction:.3f} of each layer", expected=expected)


def attach_unchecked(model: nn.Module, plan: Plan) -> Plan:
    """Attach without hashing weights. Returns the plan, whose tensors are the live factors: there is one copy."""
    attachment.attach_unchecked(model, plan, copy=False)
    return plan


def live_plan(plan: Plan, factors: Factors) -> Plan:
    """The same plan with the tensors that are on a model instead of its own."""
    live = [
        replace(adapter, **{key: getattr(factors, f"a{index}_{key}").detach() for key in adapter.tensors()})
        for index, adapter in enumerate(plan.adapters)
    ]
    found = replace(plan, adapters=tuple(live))
    vars(found)["_digest"] = plan.digest()
    return found


class RecordingMeter(Meter):
    """A meter that also keeps v^2 of every masked product, while ``rows`` is a dict."""

    rows: dict[str, list[Tensor]] | None = None

    def reset(self) -> None:
        """Forget what was counted."""
        self._kept, self._rows = {}, {}

    def _count(self, key: tuple[str, str], v: Tensor, tau: Tensor | None = None) -> None:
        name, part = key
        if self.rows is not None and part == "tau":
            self.rows.setdefault(name, []).append(v.detach().float().square().flatten())
        super()._count(key, v, tau)


def set_thresholds(meter: RecordingMeter, plan: Plan, decode: Callable[[], object], *, rounds: int = 3) -> None:
    """Set every tau of the attached ``plan`` in place, so that its density is what is measured while ``decode`` runs.

    Starting from all kept, each round measures under the thresholds of the round before.
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

    # rows of U^T W share the energy of W, out * width * std^2, over min(out, width) components
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
    row, bias = weight_bytes(1, out, _floating(config.factor_bits, site.weight)), problem.bias(names)
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


def _stored(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    return (matrix, None) if bits == 16 else pack(matrix.contiguous(), bits)


def _floating(bits: int, weight: Tensor) -> int:
    """16 means as the model's weights are."""
    return 8 * weight.element_size() if bits == 16 else bits


def _with_cheap_digest(plan: Plan) -> Plan:
    """The digest of facts alone: random factors follow from them."""
    vars(plan)["_digest"] = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
    return plan
