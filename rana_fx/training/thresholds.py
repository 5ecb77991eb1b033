"""Move thresholds so that a trained model keeps what its plan says.

In: a model with a plan attached and text. Out: the model with every adapter's thresholds scaled by one number, such that it keeps
as many ranks (inputs) per token as planned. Training changes activations, and with them what the old thresholds keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx._backend import rewrite
from rana_fx.apply import gate_mask
from rana_fx.calibration.batches import call, evaluating, mask_of, observing, padding_masks, real_rows, to_device
from rana_fx.calibration.score_histogram import Histogram
from rana_fx.errors import NoBatches
from rana_fx.evaluation.measure import Measurement, measuring
from rana_fx.kernels.ops import masked_gemv
from rana_fx.modules import device_of, unwrap
from rana_fx.training.parameters import attachment_to_train

SETTLING = 32_000  # tokens that are enough, as many as adapt takes
_TOP = 2.0**40  # histograms reach 56 octaves below; scores over their threshold lie around one


def rethreshold(model: nn.Module, batches: Iterable[dict[str, Tensor]], *, rounds: int = 2) -> Measurement:
    """Scale the thresholds of the attached plan in place, and measure the result on the same text.

    Adapters see what earlier ones pass on, so a second round settles what the first one moved. ``trained_plan`` holds the new
    thresholds. Thresholds of zero (static and stored adapters) stay.

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
        with torch.no_grad(), evaluating(model), observing(model):
            scores.run(batches)
        for (name, part), histogram in scores.seen.items():
            number = index[name]
            adapter, tau = found.plan.adapters[number], found.tensor(number, part)
            share = adapter.density if part == "tau" else adapter.router_density
            profile = histogram.merged()
            assert tau is not None
            scaled = tau * profile.keep(round(share * profile.total))[0]
            tau.copy_(torch.where((tau > 0) & torch.isfinite(tau), scaled, tau))  # what is always or never kept stays so
    with measuring(model) as meter:
        for batch in batches:
            meter.run(batch)
        return meter.result()


class _Scores:
    """Histograms of v^2 / tau, by adapter and part, over real tokens."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.seen: dict[tuple[str, str], Histogram] = {}
        self._masks: dict[str, Tensor] = {}

    def run(self, batches: Sequence[dict[str, Tensor]]) -> None:
        compiled = torch.compile(self._model, backend=self._backend)
        for batch in batches:
            moved = to_device(batch, device_of(self._model))
            self._masks = padding_masks(moved)
            call(compiled, moved)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        rewrite(gm, example_inputs)
        done: set[tuple[Any, ...]] = set()
        gates = {node.meta["rana_adapter"] for node in gm.graph.nodes if node.target is gate_mask}
        for node in list(gm.graph.nodes):
            if node.target not in (masked_gemv, gate_mask):
                continue
            key = (node.meta["rana_adapter"], node.meta.get("rana_part", "tau"))
            # behind a gate mask, what is multiplied has zeros where it is not kept: its thresholds are not the plan's
            if key[0] in gates and node.target is not gate_mask:
                continue
            if (node.args[0], key) not in done:
                done.add((node.args[0], key))
                with gm.graph.inserting_before(node):
                    gm.graph.call_function(self._add, (key, node.args[0], node.args[1]))
        gm.recompile()
        return gm.forward

    def _add(self, key: tuple[str, str], v: Tensor, tau: Tensor) -> None:
        if not bool((tau > 0).any()):
            return
        rows = real_rows(v, mask_of(v, self._masks))
        scores = torch.nan_to_num(rows.float().square() / tau, nan=_TOP, posinf=_TOP).clamp_(max=_TOP)
        if key not in self.seen:
            self.seen[key] = Histogram(torch.zeros(scores.shape[-1], dtype=torch.int64, device=scores.device), _TOP)
        self.seen[key].add(scores)
