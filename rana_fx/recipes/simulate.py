"""Simulate adapters inside a dense model before there is a plan: what they really keep, and how far the model's output moves.

In: an instrumented model, batches and adapters. Out: an ``Outcome``. The output of each linear is replaced by what its adapter
computes (rana_fx/apply.py, which the compiled model is recorded from). Adapted linears read what the adapted linears before
them produce, so kept ranks are those of the adapted model. A gated adapter has its mask from the output of its gate, which runs
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.apply import NONZERO, Observer, Target, apply, nonzero_tau, spans
from rana_fx.calibration.instrumented import InstrumentedModel
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.sensitivity import divergence
from rana_fx.cost import Kept
from rana_fx.kernels.reference import kept

_CAST = ("router", "weight", "bias", "shift")  # floating ones have the model's dtype


@dataclass(frozen=True)
class Outcome:
    """What adapters kept per token, by name, and the divergence of the model's outputs from the dense model's per token.

    An adapter that no batch reached is not in ``kept``; what it has no mask for is None there.
    """

    kept: dict[str, Kept]
    divergence: float


@dataclass
class _Computed:
    """What an adapter computed from x so far, by site."""

    x: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def is_from(self, x: Tensor) -> bool:
        return self.x.data_ptr() == x.data_ptr() and self.x.shape == x.shape


class AdapterSimulator:
    """Simulates a set of adapters inside the dense model.

    ``sums``: by adapter and part (as rana_fx.apply names them), how many elements of masks were set, over real tokens;
    ``tokens``: how many of these each adapter computed.
    """

    def __init__(self, model: InstrumentedModel, layout: Layout, adapters: Sequence[Adapter]) -> None:
        self._model = model
        self._of = {name: adapter for adapter in adapters for name in adapter.sites}
        self._activations = {block.down: block.activation for block in layout.blocks}
        self._gated = {adapter.gate: adapter for adapter in adapters if adapter.gate is not None}
        self._tensors = {adapter.name: _tensors_of(adapter, layout) for adapter in adapters}
        self._targets: dict[str, Callable[[torch.dtype], Target]] = {}
        for adapter in adapters:
            columns = spans(adapter, {name: layout.sites[name].out_features for name in adapter.sites})
            self._targets |= {name: _target_of(layout, name, columns[name]) for name in adapter.sites}
        self._last: dict[str, _Computed] = {}
        self._masks: dict[str, list[Tensor]] = {}  # of gates whose down did not run yet, first come first
        self.sums: dict[tuple[str, str], float] = {}
        self.tokens: dict[str, int] = {}

    def step(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """For ``InstrumentedModel.run``."""
        adapter = self._of.get(name)
        if adapter is not None:
            y = self._output(adapter, name, x, y.dtype).reshape(y.shape).to(y.dtype)
        if name in self._gated:
            self._mask(self._gated[name], y)
        return y

    def clear(self) -> None:
        """Call before another batch: its tensors may have the addresses of those of the last one, which identify inputs."""
        self._last.clear()
        self._masks.clear()

    def means(self, part: str) -> dict[str, float]:
        """Set elements of a part's mask per token, by adapter."""
        return {name: total / max(1, self.tokens[name]) for (name, which), total in self.sums.items() if which == part}

    def kept(self) -> dict[str, Kept]:
        """What each adapter kept per token, by name."""
        return Kept.by_name(self.means("tau"), self.means("router_tau"), self.means("exact_tau"))

    def _output(self, adapter: Adapter, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        last = self._last.get(adapter.name)
        if last is None or not last.is_from(x):
            last = self._last[adapter.name] = _Computed(x)
        if name not in last.outputs:
            # as in a graph: with a weight of its own an adapter computes all of its linears at once
            sites = (name,) if adapter.reads_model else adapter.sites
            first = not last.outputs  # linears that read one tensor share its mask
            outs = apply(
                adapter,
                self._tensors[adapter.name],
                x,
                [self._targets[site](dtype) for site in sites],
                gate=self._masks[adapter.name].pop(0).view(x.shape) if adapter.kind == "gated" else None,
                every_row=True,
                observe=self._counter(adapter.name, x) if first else None,
            )
            last.outputs |= zip(sites, outs, strict=True)
        return last.outputs[name]

    def _mask(self, adapter: Adapter, y: Tensor) -> None:
        activation, tau = self._activations[adapter.name], self._tensors[adapter.name]["tau"]
        assert activation is not None
        self._masks.setdefault(adapter.name, []).append(kept(activation(y.reshape(-1, y.shape[-1])), tau))

    def _counter(self, name: str, x: Tensor) -> Observer:
        self.tokens[name] = self.tokens.get(name, 0) + len(self._model.real(x))

        def count(part: str, output: Tensor, mask: Callable[[], Tensor] | None) -> None:  # noqa: ARG001
            if mask is not None:
                self.sums[name, part] = self.sums.get((name, part), 0.0) + float(self._model.real(mask()).sum())

        return count


def simulate(
    model: InstrumentedModel, layout: Layout, adapters: Sequence[Adapter], batches: Iterable[Any], dense: Sequence[Any]
) -> Outcome:
    """Run adapters over ``batches``; ``dense``: the dense model's outputs for the first of these, to compare with."""
    simulator = AdapterSimulator(model, layout, adapters)
    moved, rows = 0.0, 0
    for index, batch in enumerate(batches):
        output = model.run(batch, simulator.step)
        simulator.clear()
        if index < len(dense):
            found, count = divergence(output, dense[index], model)
            moved, rows = moved + found, rows + count
    return Outcome(simulator.kept(), moved / max(1, rows))


def _tensors_of(adapter: Adapter, layout: Layout) -> dict[str, Tensor]:
    """Its tensors on the model's device, as attaching it would put them there.

    What is stored in few bits stays so: unpacked, all of a model at once would be a second model.
    """
    weight = layout.sites[adapter.sites[0]].weight
    found = {}
    for key, value in adapter.tensors().items():
        moved = value.to(weight.device)
        found[key] = moved.to(weight.dtype) if key in _CAST and value.is_floating_point() else moved
    if adapter.kind == "gated":
        found[NONZERO] = nonzero_tau(adapter, weight.device)
    return found


def _target_of(layout: Layout, name: str, span: tuple[int, int]) -> Callable[[torch.dtype], Target]:
    site = layout.sites[name]
    weight, bias = site.view.detach(), None if site.bias is None else site.bias.detach()
    return lambda dtype: Target(name, span, weight, bias, dtype)
