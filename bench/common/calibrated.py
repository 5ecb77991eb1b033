"""Calibrate a model once, then make plans of any recipe and budget from the same samples.

In: a model and calibration batches. Out: plans equal to those ``rana_fx.adapt`` makes from these batches. A sweep over
thirty plans runs the model over the calibration text once instead of thirty times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench.common.record import head
from rana_fx.adaptation import CalibratedModel, planned, solved
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.holdout import Tee
from rana_fx.calibration.layout import Layout
from rana_fx.evaluation.text import load_texts, token_batches
from rana_fx.plan import Plan
from rana_fx.recipes import RECIPES, Recipe


@dataclass(frozen=True, eq=False)
class Calibrated(CalibratedModel):
    """A model's layout and samples of every input that any recipe may ask for."""

    def head(self, bench: str, model: str, calib: str, *, context: int, dtype: str) -> dict[str, Any]:
        """What all rows of a bench say of the calibrated model."""
        return head(bench) | {
            "model": Path(model).name,
            "calibration": Path(calib).name,
            "calibration_tokens": self.tokens,
            "context": context,
            "dtype": dtype,
            "seed": self.seed,
        }

    def plan(self, *, budget: float, metric: str, recipe: str | Recipe, progress: bool = False) -> Plan:
        """``recipe``: its name, or a recipe that has none. Raises BudgetUnreachable, TooFewTokens."""
        chosen = RECIPES[recipe] if isinstance(recipe, str) else recipe
        problem = self.problem(budget=budget, metric=metric, recipe=chosen.name, progress=progress)
        return planned(self, problem, solved(problem, chosen))


def calibrate_once(model: nn.Module, batches: Iterable[Any], *, seed: int = 0, progress: bool = False) -> Calibrated:
    """Sample the inputs of all groups that the budget counts."""
    tee = Tee(batches)
    found = calibrate(model, tee, wanted=counted_groups, seed=seed, progress=progress)
    return Calibrated(type(model).__name__, found.layout, found.samples, found.tokens, seed, tee.holdout(model))


def counted_groups(layout: Layout) -> set[tuple[str, ...]]:
    """Groups, by their site names, with a site in the budget."""
    return {layout.sites_of_group(site.name) for site in layout.sites.values() if site.counted}


def batches_of(source: str, tokenizer: Any, *, tokens: int, context: int, batch_size: int = 8) -> list[dict[str, Tensor | bool]]:
    """Packed ``input_ids`` and ``attention_mask`` of a text, for a model that shall build no cache."""
    found = token_batches(load_texts(source), tokenizer, tokens=tokens, context=context, batch_size=batch_size)
    return [{**batch, "use_cache": False} for batch in found]
