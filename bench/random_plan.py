"""Plans without calibration: adapters of the menu with random factors, and exactly the cost that was asked.

In: a model, its layout and a budget in bytes. Out: a ``Plan`` like any other, on the model, with its thresholds set. A latency
bench depends on ranks, densities and dtypes, not on what the factors mean. Every adapter costs one fraction p of its layers:

    rank    attention inputs over one tensor, stacked; up and gate, stacked (or each alone)
            r = min(p i / (density + i / o), o i / (o + i)),  k = p i - r i / o          router r i + product k o = p o i
    neuron  attention output, down                                                         k = p i

The second bound on r is the cap above which a batch, which needs every row, costs more than dense. The router has the scale of
U^T W, and the rows of A^T have length one, so activations stay what they were. Thresholds are the quantile of v^2 that keeps k
of r, seen while the rewritten model decodes: what a layer reads depends on what the layers before it kept.

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

from rana_fx.adaptation import versions
from rana_fx.adapters import Adapter
from rana_fx.attachment import Factors, place
from rana_fx.calibrate import calibrate
from rana_fx.errors import InvalidOption
from rana_fx.layout import Layout
from rana_fx.measure import Meter
from rana_fx.plan import Plan, SiteRecord
from rana_fx.recipes.problem import Problem, stack_name
from rana_fx.running import device_of

_ALIGNED = 16  # ranks come in whole tiles where there are many
RECIPE = "random"


@dataclass(frozen=True)
class Menu:
    """How a budget is spent.

    density: fraction of a router's ranks that is kept, where the cap on ranks allows it. stacked: one rank adapter for all
    up projections of a block. router_bits: what routers are stored in; 16 until the rewrite passes a scale to rana::router.
    """

    density: float = 0.5
    stacked: bool = True
    router_bits: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InvalidOption(name="density", got=self.density, expected="a number in (0, 1]")
        if self.router_bits != 16:
            expected = "16: the rewrite multiplies by a floating router and hands no scale to rana::router yet"
            raise InvalidOption(name="router_bits", got=self.router_bits, expected=expected)


def layout_of(model: nn.Module) -> Layout:
    """Sites, stacks and blocks of a language model, from one traced call on four tokens."""
    ids_BT = torch.arange(4, device=device_of(model)).unsqueeze(0)
    batch = {"input_ids": ids_BT, "use_cache": False}
    layout, _, _ = calibrate(model, [batch], wanted=lambda _: set(), capacity=4, progress=False)
    return layout


def random_plan(model: nn.Module, layout: Layout, budget: float, *, menu: Menu | None = None, seed: int = 0) -> Plan:
    """A plan whose expected cost in weight bytes is ``budget``, thresholds still zero; factors on the model's device.

    Raises:
        BudgetUnreachable, InvalidOption.
    """
    menu = menu or Menu()
    problem = Problem(layout, {}, budget, "bytes", RECIPE, progress=False)
    ranked = layout.stacks()
    for block in layout.blocks:
        ranked += [block.ups] if menu.stacked else [(up,) for up in block.ups]
    masked = [site.name for site in layout.sites.values() if site.role == "attention_out"] + [b.down for b in layout.blocks]
    adapted = (*(name for names in ranked for name in names), *masked)
    fraction = min(1.0, problem.fraction(adapted, why="some linears are neither of attention nor of an MLP block"))
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    with torch.no_grad():
        adapters = [_rank(problem, names, fraction, menu, generator) for names in ranked]
        adapters += [_neuron(problem, name, fraction) for name in masked]
    order = {name: index for index, name in enumerate(layout.sites)}
    plan = Plan(
        recipe=RECIPE,
        metric="bytes",
        budget=budget,
        seed=seed,
        tokens=0,
        model=type(model).__name__,
        versions=versions(),
        sites=tuple(_record(layout, name) for name in layout.sites),
        adapters=tuple(sorted(adapters, key=lambda adapter: order[adapter.sites[0]])),
        skips=layout.skips,
    )
    return _with_cheap_digest(plan)


def ranks_for(out: int, width: int, fraction: float, density: float) -> tuple[int, float]:
    """(ranks r, expected kept k) of a rank adapter that costs ``fraction`` of out * width."""
    cap = out * width / (out + width)
    ranks = min(fraction * width / (density + width / out), cap)
    whole = _ALIGNED if ranks >= 4 * _ALIGNED else 1
    count = max(1, int(ranks) // whole * whole)
    return count, min(float(count), fraction * width - count * width / out)


def attach_unchecked(model: nn.Module, plan: Plan) -> Plan:
    """Attach without hashing weights. Returns the plan, whose tensors are the live factors: there is one copy."""
    place(model, plan, copy=False)
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


class Watch(Meter):
    """A meter that also keeps v^2 of every masked product, while ``rows`` is a dict."""

    rows: dict[str, list[Tensor]] | None = None

    def reset(self) -> None:
        """Forget what was counted."""
        self._kept, self._rows = {}, {}

    def _count(self, key: tuple[str, str], v: Tensor, tau: Tensor) -> None:
        name, part = key
        if self.rows is not None and part == "tau":
            self.rows.setdefault(name, []).append(v.detach().float().square().flatten())
        super()._count(key, v, tau)


def set_thresholds(watch: Watch, plan: Plan, decode: Callable[[], object], *, rounds: int = 3) -> None:
    """Set every tau of the attached ``plan`` in place, so that its density is what is measured while ``decode`` runs.

    Starting from all kept, each round measures under the thresholds of the round before.
    """
    for _ in range(rounds):
        watch.rows = {}
        decode()
        for adapter in plan.adapters:
            squares = torch.cat(watch.rows[adapter.name])
            kept = round(adapter.density * squares.numel())
            adapter.tau.fill_(squares.kthvalue(squares.numel() - kept + 1).values if kept else float("inf"))
    watch.rows = None
    watch.reset()


def _rank(problem: Problem, names: tuple[str, ...], fraction: float, menu: Menu, generator: torch.Generator) -> Adapter:
    sites = [problem.layout.sites[name] for name in names]
    weight = sites[0].weight
    out, width = sum(site.out_features for site in sites), sites[0].in_features
    ranks, kept = ranks_for(out, width, fraction, menu.density)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        made = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
        return made.normal_(0, scale, generator=generator)

    # rows of U^T W share the energy of W, out * width * std^2, over min(out, width) components
    std = float(torch.stack([site.view.float().std() for site in sites]).mean())
    bias = problem.bias(names)
    flops = sites[0].uses * (ranks * width + kept * out)
    return Adapter(
        name=stack_name(names),
        kind="rank",
        sites=names,
        ranks=ranks,
        kept=kept,
        tau=torch.zeros(ranks, device=weight.device),
        router=normal(ranks, width, std * (out / min(out, width)) ** 0.5),
        weight=normal(ranks, out, out**-0.5),
        bias=None if bias is None else bias.to(weight.dtype),
        flops=flops,
        dense_flops=problem.flops(names),
        bytes=flops * weight.element_size(),
        dense_bytes=problem.bytes(names),
    )


def _neuron(problem: Problem, name: str, fraction: float) -> Adapter:
    site = problem.layout.sites[name]
    zeros = torch.zeros(site.in_features, device=site.weight.device)
    made = problem.neuron_adapter(name, 0.0, torch.ones_like(zeros), fraction)
    return replace(made, tau=zeros)


def _record(layout: Layout, name: str) -> SiteRecord:
    site = layout.sites[name]
    return SiteRecord(
        site.name, site.role, site.op, site.out_features, site.in_features, site.transposed, site.uses, site.counted,
        str(site.weight.dtype).removeprefix("torch."), "",
    )  # fmt: skip


def _with_cheap_digest(plan: Plan) -> Plan:
    """The digest of facts alone: random factors follow from them."""
    vars(plan)["_digest"] = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
    return plan
