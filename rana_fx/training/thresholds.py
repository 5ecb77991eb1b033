"""Scale thresholds so that a trained model keeps as many values as its plan expects.

In: a model with a plan attached and text. Out: the model with every adapter's thresholds scaled by one number, such that it keeps
as many ranks (inputs) per token as planned. Training changes activations, and with them the number of values that reach a
threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx._backend import rewrite
from rana_fx.calibration.probe import Probe, call_before, probing
from rana_fx.calibration.score_histogram import Histogram
from rana_fx.errors import NoBatches
from rana_fx.evaluation.measure import Measurement, masked_nodes, measuring
from rana_fx.modules import unwrap
from rana_fx.training.parameters import attachment_to_train

SAMPLE_TOKENS = 32_000  # enough tokens to estimate thresholds: as many as adapt samples
_TOP = 2.0**40  # histograms reach 56 octaves below; ratios of score to threshold are around one


def rethreshold(model: nn.Module, batches: Iterable[dict[str, Tensor]], *, rounds: int = 2) -> Measurement:
    """Scale the thresholds of the attached plan in place, and measure the result on the same text.

    Adapters read the outputs of earlier ones, so a second round corrects for the changes of the first one. ``trained_plan``
    returns a plan with the new thresholds. Thresholds of zero (static and stored adapters) stay.

    Args:
        batches: as ``adapt`` takes them; about 32,000 tokens are enough. rounds: how often thresholds are estimated.

    Raises:
        NoPlan, NoBatches.
    """
    model, batches = unwrap(model), list(batches)
    found = attachment_to_train(model)
    if not batches:
        raise NoBatches(hint="as adapt takes them")
    index = {adapter.name: number for number, adapter in enumerate(found.plan.adapters)}
    for _ in range(rounds):
        scores = _Scores(model)
        with torch.no_grad(), probing(model):
            scores.run(batches)
        for (name, part), histogram in scores.seen.items():
            number = index[name]
            adapter, tau = found.plan.adapters[number], found.tensor(number, part)
            share = adapter.density if part == "tau" else adapter.router_density
            profile = histogram.merged()
            assert tau is not None
            scaled = tau * profile.keep(round(share * profile.total))[0]
            tau.copy_(torch.where((tau > 0) & torch.isfinite(tau), scaled, tau))  # values that are always or never kept stay so
    with measuring(model) as meter:
        for batch in batches:
            meter.run(batch)
        return meter.result()


class _Scores:
    """Histograms of v^2 / tau, by adapter and part, over real tokens."""

    def __init__(self, model: nn.Module) -> None:
        self._probe = Probe(model, self._instrument)
        self.seen: dict[tuple[str, str], Histogram] = {}

    def run(self, batches: Sequence[dict[str, Tensor]]) -> None:
        for batch in batches:
            self._probe.run(batch)

    def _instrument(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        rewrite(graph_module, example_inputs)
        masks = masked_nodes(graph_module.graph)
        gated = {mask.adapter for mask in masks if mask.is_gate}
        done: set[tuple[fx.Node, str, str]] = set()
        for mask in masks:
            # behind a gate, dropped values are zeros already, and the matmul's thresholds are constants, not the plan's
            own = mask.tau is not None and (mask.is_gate or mask.adapter not in gated)
            key = (mask.value, mask.adapter, mask.part)
            if own and key not in done:
                done.add(key)
                call_before(mask.node, self._add, (mask.adapter, mask.part), mask.value, mask.tau)

    def _add(self, key: tuple[str, str], v: Tensor, tau: Tensor) -> None:
        if not bool((tau > 0).any()):
            return
        rows = self._probe.real(v)
        scores = torch.nan_to_num(rows.float().square() / tau, nan=_TOP, posinf=_TOP).clamp_(max=_TOP)
        if key not in self.seen:
            self.seen[key] = Histogram(torch.zeros(scores.shape[-1], dtype=torch.int64, device=scores.device), _TOP)
        self.seen[key].add(scores)
