"""The methods that ``bench.quality`` compares: plans of recipes, rounded weights, a sliced model.

In: a calibrated model, a name and a budget. Out: a ``Method``: its expected cost as a fraction of dense and, inside the context
``on``, two functions called like the model, one for the method and one for the dense model. On exit the model is restored
exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.common.calibrated import Calibrated
from bench.quality.quantised import Rounder, Rounding
from bench.quality.slicegpt import Sliced, sliced
from rana_fx.calibration.batches import evaluating
from rana_fx.evaluation.measure import measuring
from rana_fx.plan import Plan
from rana_fx.runtime.attachment import attach, detach


@dataclass(frozen=True, eq=False)
class Running:
    """A method and the dense model, both callable. ``measured``: the budget by metric, over the calls so far."""

    adapted: Callable[..., Any]
    dense: Callable[..., Any]
    measured: Callable[[], dict[str, float]]


class Method(Protocol):
    """A way to make a model cheaper. ``facts``: further fields of its rows."""

    @property
    def expected(self) -> dict[str, float]: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def on(self, model: nn.Module) -> Any:
        """A context manager that yields a ``Running``."""
        ...


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan of a recipe; the rewritten graph runs with reference kernels."""

    plan: Plan

    @property
    def expected(self) -> dict[str, float]:
        return {unit: self.plan.expected_budget(unit) for unit in ("flops", "bytes")}

    @property
    def facts(self) -> dict[str, Any]:
        return {"digest": self.plan.digest()[:12]}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Running]:
        attach(model, self.plan)
        try:
            with measuring(model) as meter:

                def measured() -> dict[str, float]:
                    found = meter.result()
                    return {"flops": found.budget_flops, "bytes": found.budget_bytes}

                # a plan only changes compiled graphs: called eagerly the model is dense
                yield Running(meter, model, measured)
        finally:
            detach(model)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A model with other values in its weights. ``bytes``: over the dense bytes."""

    weights: Mapping[nn.Parameter, Tensor]
    bytes: float

    @property
    def expected(self) -> dict[str, float]:
        return {"flops": 1.0, "bytes": self.bytes}

    @property
    def facts(self) -> dict[str, Any]:
        return {}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Running]:
        def adapted(**batch: Any) -> Any:
            with swapped(self.weights), torch.no_grad():
                return model(**batch)

        with evaluating(model):
            yield Running(adapted, model, lambda: self.expected)


@dataclass(frozen=True, eq=False)
class Slices:
    """A model whose residual stream has fewer dimensions (SliceGPT)."""

    sliced: Sliced

    @property
    def expected(self) -> dict[str, float]:
        return {"flops": self.sliced.cost, "bytes": self.sliced.cost}

    @property
    def facts(self) -> dict[str, Any]:
        return {"dimensions": self.sliced.directions[0].shape[1]}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Running]:
        def adapted(**batch: Any) -> Any:
            with self.sliced.acting(), torch.no_grad():
                return model(**batch)

        with evaluating(model):
            yield Running(adapted, model, lambda: self.expected)


@contextmanager
def swapped(weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside, the Parameters have the given values; on exit their own storage again."""
    own = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, value in weights.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in own.items():
            parameter.data = value


class MethodBuilder:
    """Makes the methods of one calibrated model. ``batches``: the calibration text, on which SliceGPT runs the model."""

    def __init__(self, model: nn.Module, calibrated: Calibrated, batches: Sequence[Any], *, metric: str, progress: bool) -> None:
        self._model, self._calibrated, self._batches = model, calibrated, batches
        self._metric, self._progress = metric, progress
        self._rounder = Rounder(calibrated.problem(budget=1.0, metric="bytes", recipe="dense"))

    def at_budget(self, name: str, budget: float) -> Method:
        """A recipe or ``slicegpt`` at a budget. Raises BudgetUnreachable, InvalidOption, TooFewTokens."""
        if name == "slicegpt":
            with evaluating(self._model):
                return Slices(sliced(self._model, self._calibrated.layout, budget=budget, batches=self._batches))
        return Planned(self._calibrated.plan(budget=budget, metric=self._metric, recipe=name, progress=self._progress))

    def rounded(self, rounding: Rounding) -> Method:
        """A rounding as a method. Raises InvalidOption."""
        with torch.no_grad():
            weights = self._rounder.weights(rounding)
        return Rounded(weights, self.bytes_kept(rounding))

    def bytes_kept(self, rounding: Rounding) -> float:
        """Bytes of the rounded weights over the dense bytes."""
        return self._rounder.bytes_kept(rounding)
