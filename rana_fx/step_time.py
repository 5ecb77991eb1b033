"""Expected time of a decoded token on a GPU, dense and with a plan.

In: a layout, and a plan for it. Out: a ``StepTime``. Linears and adapters are estimated one launch at a time
(rana_fx/runtime/adapter_time.py); an attention (rotary embeddings, cache, attention over a short context), a norm and an
activation cost what they do on an H200, whatever their size (kernels/cost.py). Both steps have the attention that
``rana_fx.backend`` uses, so that their ratio is what the plan gains. docs/reference/results.md compares with measured steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout, Site
from rana_fx.calibration.records import records
from rana_fx.kernels import cost
from rana_fx.plan import Plan
from rana_fx.runtime.adapter_time import adapter_us, dense_us, linear_us

_INSIDE = ("attention_out", "down")  # roles whose input is no norm's output


@dataclass(frozen=True)
class StepTime:
    """Microseconds of a decoded token.

    linears: of each adapter and each dense linear, by name. replaced: for each adapter, what the linears that it replaces take
    dense. rest: everything else; dense_rest: the same in the dense model.
    """

    linears: dict[str, float]
    replaced: dict[str, float]
    rest: float
    dense_rest: float

    @property
    def ms(self) -> float:
        """Milliseconds with the plan."""
        return (sum(self.linears.values()) + self.rest) / 1000

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the dense model."""
        return (sum(self.replaced.get(name, us) for name, us in self.linears.items()) + self.dense_rest) / 1000

    @property
    def slower(self) -> tuple[str, ...]:
        """Adapters that take longer than the linears they replace."""
        return tuple(name for name, us in self.replaced.items() if self.linears[name] >= us)


def step_time(layout: Layout, plan: Plan | None, device: torch.device) -> StepTime | None:
    """The expected time of one token of one sequence, or None where nothing was measured (not a GPU)."""
    if device.type != "cuda":
        return None
    sites = {site.name: site for site in records(layout, hashed=False)}
    adapters = () if plan is None else plan.adapters
    adapter_of = {name: adapter for adapter in adapters for name in (*adapter.sites, *adapter.also)}
    # read of each norm's output; routers compute the norm in their launch if nothing else reads it
    readers = [group.sites for group in layout.groups if any(_behind_norm(layout.sites[name]) for name in group.sites)]
    in_routers = [names for names in readers if all(_has_router(adapter_of.get(name)) for name in names)]
    normed = {name for names in in_routers for name in names}
    linears = {one.name: adapter_us(one, sites, device, normed=one.sites[0] in normed) for one in adapters}
    linears |= {name: linear_us(site, device) for name, site in sites.items() if name not in adapter_of}
    replaced = {one.name: dense_us(one, sites, device) for one in adapters}
    measured = cost.nearest(device)
    attentions = len({site.attention for site in layout.sites.values() if site.attention is not None})
    always = measured.step_us + attentions * measured.attention_us
    fused = sum(_in_one_launch(block.ups, adapter_of) for block in layout.blocks)
    return StepTime(
        _known(linears),
        _known(replaced),
        always + (len(readers) - len(in_routers)) * measured.norm_us + (len(layout.blocks) - fused) * measured.pointwise_us,
        always + len(readers) * measured.norm_us + len(layout.blocks) * measured.pointwise_us,
    )


def expected(step: StepTime, *, named: int = 3) -> str:
    """A sentence about a step; of adapters that are slower than their linears it names the first few."""
    if not step.replaced:
        return f"a decoded token is expected to take {step.ms:.2f} ms"
    text = f"a decoded token is expected to take {step.ms:.2f} ms, dense {step.dense_ms:.2f} ms"
    if step.slower:
        more = f" and {len(step.slower) - named} more" if len(step.slower) > named else ""
        text += f"; the linears of {', '.join(step.slower[:named])}{more} are faster dense, as prefill=dense leaves them"
    return text


def _behind_norm(site: Site) -> bool:
    return site.role not in _INSIDE


def _has_router(adapter: Adapter | None) -> bool:
    """Whether every input is read by a router alone."""
    return adapter is not None and adapter.router is not None and adapter.router_tau is None and adapter.exact_tau is None


def _in_one_launch(ups: tuple[str, ...], adapter_of: Mapping[str, Adapter]) -> bool:
    """Whether the product with the activation is computed by the launch of one adapter of them all."""
    found = [adapter_of.get(up) for up in ups]
    return len(found) > 1 and found[0] is not None and all(one is found[0] for one in found)


def _known(times: Mapping[str, float | None]) -> dict[str, float]:
    return {name: us for name, us in times.items() if us is not None}
