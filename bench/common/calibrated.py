"""Calibrate a model once, then make plans of any recipe and budget from the same samples.

In: a model and calibration batches. Out: plans equal to those ``rana_fx.adapt`` makes from these batches. A sweep over
thirty plans needs one run of the model over the calibration text instead of thirty.
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
    """A model's layout, and samples of the inputs of all linears that the budget counts."""

    def head(self, bench: str, model: str, calib: str, *, context: int, dtype: str) -> dict[str, Any]:
        """Facts about the model and its calibration that all rows of a bench share."""
        return head(bench) | {
            "model": Path(model).name,
            "calibration": Path(calib).name,
            "calibration_tokens": self.tokens,
            "context": context,
            "dtype": dtype,
            "seed": self.seed,
        }

    def plan(self, *, budget: float, metric: str, recipe: str | Recipe, progress: bool = False) -> Plan:
        """``recipe``: a name in ``RECIPES``, or a recipe object. Raises BudgetUnreachable, TooFewTokens."""
        chosen = RECIPES[recipe] if isinstance(recipe, str) else recipe
        problem = self.problem(budget=budget, metric=metric, recipe=chosen.name, progress=progress)
        return planned(self, problem, solved(problem, chosen))


def calibrate_once(model: nn.Module, batches: Iterable[Any], *, seed: int = 0, progress: bool = False) -> Calibrated:
    """Calibrate ``model``: sample the inputs of all groups that the budget counts."""
    tee = Tee(batches)
    found = calibrate(model, tee, wanted=counted_groups, seed=seed, progress=progress)
    return Calibrated(type(model).__name__, found.layout, found.samples, found.tokens, seed, tee.holdout(model))


def counted_groups(layout: Layout) -> set[tuple[str, ...]]:
    """Groups (tuples of site names) with at least one site that the budget counts."""
    return {layout.sites_of_group(site.name) for site in layout.sites.values() if site.counted}


def batches_of(source: str, tokenizer: Any, *, tokens: int, context: int, batch_size: int = 8) -> list[dict[str, Tensor | bool]]:
    """Packed ``input_ids`` and ``attention_mask`` of a text, (batch, context) each, with ``use_cache=False``."""
    found = token_batches(load_texts(source), tokenizer, tokens=tokens, context=context, batch_size=batch_size)
    return [{**batch, "use_cache": False} for batch in found]
