"""What ``bench.quality`` compares: plans of recipes, rounded weights, a sliced model; each ready to run beside the dense one.

In: a calibrated model, a name and a budget. Out: an ``Entrant``: what it is expected to cost and, inside ``on``, two functions
called like the model: the entrant's and the dense model's. Afterwards the model is what it was, bit for bit.
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
    """``measured``: budget by metric, of the calls so far."""

    adapted: Callable[..., Any]
    dense: Callable[..., Any]
    measured: Callable[[], dict[str, float]]


class Entrant(Protocol):
    """``facts``: what else its rows say."""

    @property
    def expected(self) -> dict[str, float]: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def on(self, model: nn.Module) -> Any:
        """A context that gives a ``Running``."""
        ...


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan of a recipe, as ``torch.compile`` runs it, with reference kernels."""

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

                # a plan acts in compiled graphs alone: called eagerly the model is dense
                yield Running(meter, model, measured)
        finally:
            detach(model)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Other numbers in the weights."""

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
    """The residual stream in fewer dimensions."""

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
    """Inside, Parameters show other memory; afterwards their own again."""
    own = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, value in weights.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in own.items():
            parameter.data = value


class Maker:
    """Makes entrants of one calibrated model. ``batches``: the calibration text, for those that run the model on it."""

    def __init__(self, model: nn.Module, calibrated: Calibrated, batches: Sequence[Any], *, metric: str, progress: bool) -> None:
        self._model, self._calibrated, self._batches = model, calibrated, batches
        self._metric, self._progress = metric, progress
        self._rounder = Rounder(calibrated.problem(budget=1.0, metric="bytes", recipe="dense"))

    def at(self, name: str, budget: float) -> Entrant:
        """A recipe or ``slicegpt`` at a budget. Raises BudgetUnreachable, InvalidOption, TooFewTokens."""
        if name == "slicegpt":
            with evaluating(self._model):
                return Slices(sliced(self._model, self._calibrated.layout, budget=budget, batches=self._batches))
        return Planned(self._calibrated.plan(budget=budget, metric=self._metric, recipe=name, progress=self._progress))

    def rounded(self, rounding: Rounding) -> Entrant:
        """Raises InvalidOption."""
        with torch.no_grad():
            weights = self._rounder.weights(rounding)
        return Rounded(weights, self.bytes_kept(rounding))

    def bytes_kept(self, rounding: Rounding) -> float:
        return self._rounder.bytes_kept(rounding)
