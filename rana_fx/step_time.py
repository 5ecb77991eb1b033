"""Expected time of a decoded token on a GPU, dense and with a plan.

In: a layout, and a plan for it. Out: a ``StepTime``. Linears and adapters are estimated one launch at a time
(rana_fx/runtime/adapter_time.py); an attention (rotary embeddings, cache, attention over a short context), a norm and an
activation cost what they do on an H200, whatever their size (kernels/cost.py). Both steps have the attention that
``rana_fx.backend`` uses, so that their ratio is what the plan gains. docs/reference/results.md compares with measured steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout, Site
from rana_fx.calibration.records import records
from rana_fx.kernels import cost
from rana_fx.plan import Plan, SiteRecord
from rana_fx.runtime.adapter_time import adapter_us, dense_us, linear_us, takes_norm

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
    # what reads each norm's output; launches that compute the norm do if nothing else reads it
    readers = [group.sites for group in layout.groups if any(_behind_norm(layout.sites[name]) for name in group.sites)]
    in_launches = [names for names in readers if _take_norm([adapter_of.get(name) for name in names], sites, device)]
    normed = {name for names in in_launches for name in names}
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
        always + (len(readers) - len(in_launches)) * measured.norm_us + (len(layout.blocks) - fused) * measured.pointwise_us,
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


def _take_norm(readers: Sequence[Adapter | None], sites: Mapping[str, SiteRecord], device: torch.device) -> bool:
    """Whether a norm is computed by the launches of all that reads it. Routers beside products share no launch, nor do products
    in 16 bits of one input take a norm, which share one.
    """
    adapters = [one for one in readers if one is not None]
    distinct = {id(one): one for one in adapters}.values()
    plain = sum(one.router is None and one.weight_scale is None for one in distinct)
    alike = len({one.router is None for one in distinct}) == 1
    return len(adapters) == len(readers) and alike and plain <= 1 and all(takes_norm(one, sites, device) for one in distinct)


def _in_one_launch(ups: tuple[str, ...], adapter_of: Mapping[str, Adapter]) -> bool:
    """Whether the product with the activation is computed by the launch of one adapter of them all."""
    found = [adapter_of.get(up) for up in ups]
    return len(found) > 1 and found[0] is not None and all(one is found[0] for one in found)


def _known(times: Mapping[str, float | None]) -> dict[str, float]:
    return {name: us for name, us in times.items() if us is not None}
