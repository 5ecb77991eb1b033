"""Count what an adapted model really keeps on given text.

In: a model with a plan attached, and calls of it. Out: kept ranks per adapter and the budget measured, to hold against
the budget asked. The rewritten graph runs with its reference kernels, and a counter sits before every masked product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx._backend import rewrite
from rana_fx.calibration.batches import call, evaluating, mask_of, observing, padding_masks, real_rows, to_device
from rana_fx.errors import NoPlan
from rana_fx.kernels.ops import masked_gemv, masked_rows
from rana_fx.kernels.reference import kept
from rana_fx.modules import device_of, unwrap
from rana_fx.plan import Plan
from rana_fx.runtime.attachment import attached


@dataclass(frozen=True)
class Measurement:
    """Over ``tokens`` real tokens: kept fraction per adapter, and cost per token over the dense model's.

    ``router_density``: the fraction of its inputs that a masked router reads, for adapters that have one. ``exact_density``: the
    fraction of its outputs that are computed exactly, likewise.
    """

    tokens: int
    density: dict[str, float]
    budget_flops: float
    budget_bytes: float
    router_density: dict[str, float]
    exact_density: dict[str, float]


class Meter:
    """Calls the adapted model, with the backend's option ``prefill``, and counts."""

    def __init__(self, model: nn.Module, plan: Plan, *, prefill: str = "masked") -> None:
        self._model, self._prefill = model, prefill
        self._plan = plan
        self._compiled = torch.compile(model, backend=self._backend)
        # by name and part of the adapter: "tau" masks its ranks, "router_tau" what its router reads, "exact_tau" its outputs
        self._kept: dict[tuple[str, str], float] = {}
        self._rows: dict[tuple[str, str], int] = {}
        self._masks: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's output for one call."""
        moved_args, moved_kwargs = to_device((args, kwargs), device_of(self._model))
        self._masks = padding_masks(moved_kwargs)
        with torch.no_grad():
            return self._compiled(*moved_args, **moved_kwargs)

    def run(self, batch: Any) -> Any:
        """The adapted model's output for a batch as ``adapt`` takes them."""
        return call(self, batch)

    def result(self) -> Measurement:
        """What was counted so far."""
        mean = {key: self._kept[key] / self._rows[key] for key in self._kept if self._rows[key]}
        kept = {name: value for (name, part), value in mean.items() if part == "tau"}
        inputs = {name: value for (name, part), value in mean.items() if part == "router_tau"}
        exact = {name: value for (name, part), value in mean.items() if part == "exact_tau"}
        adapters = {adapter.name: adapter for adapter in self._plan.adapters}
        return Measurement(
            tokens=max(self._rows.values(), default=0),
            density={name: value / adapters[name].ranks for name, value in kept.items()},
            budget_flops=self._plan.expected_budget("flops", kept=kept, router_kept=inputs, exact_kept=exact),
            budget_bytes=self._plan.expected_budget("bytes", kept=kept, router_kept=inputs, exact_kept=exact),
            router_density={name: value / adapters[name].width for name, value in inputs.items()},
            exact_density={name: value / (adapters[name].out or 1) for name, value in exact.items()},
        )

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        rewrite(gm, example_inputs, prefill=self._prefill)
        counted: set[tuple[fx.Node, str, str]] = set()
        for node in list(gm.graph.nodes):
            name, part = node.meta.get("rana_adapter"), node.meta.get("rana_part", "tau")
            exact = node.target is masked_rows and part == "exact_tau"
            # what masks: v by its thresholds, or outputs by a gate of zeros and ones
            mask = node.args[1] if exact else node.args[0] if node.target is masked_gemv else None
            if mask is not None and (mask, name, part) not in counted:
                counted.add((mask, name, part))
                given = (mask,) if exact else node.args[:2]
                with gm.graph.inserting_before(node):
                    gm.graph.call_function(self._count, ((name, part), *given))
        gm.recompile()
        return gm.forward

    def _count(self, key: tuple[str, str], v: Tensor, tau: Tensor | None = None) -> None:
        """Of v what ``tau`` keeps, or what is not zero."""
        rows = real_rows(v, mask_of(v, self._masks))
        self._kept[key] = self._kept.get(key, 0.0) + float((rows != 0 if tau is None else kept(rows, tau)).sum())
        self._rows[key] = self._rows.get(key, 0) + len(rows)


@contextmanager
def measuring(model: nn.Module) -> Iterator[Meter]:
    """A ``Meter`` for a model with a plan attached; the model is in evaluation mode inside.

    Raises:
        NoPlan.
    """
    found = attached(model)
    if found is None:
        raise NoPlan(site=next((name for name, _ in model.named_parameters()), type(model).__name__))
    model = unwrap(model)
    with evaluating(model), observing(model):
        yield Meter(model, found.plan)
