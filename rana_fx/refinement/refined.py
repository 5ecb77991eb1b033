"""Adapters of a plan, refined, or as they were: whichever moves the model less on text that the training did not see.

In: a model, a solved problem, its adapters and the text of the refinement. Out: adapters, and a note on the plan that says what
was done. A refinement that gains nothing is warned of, and the adapters stay, bit by bit.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rana_fx.adapter import Adapter
from rana_fx.calibration.holdout import Holdout
from rana_fx.choices import WITHOUT_LOSS
from rana_fx.cost import Kept
from rana_fx.errors import InvalidOption, RanaWarning
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.registry import Recipe, takes_budget
from rana_fx.refinement.distill import Judge, Judged, distilled
from rana_fx.refinement.settings import Refine
from rana_fx.refinement.text import RefinementText, tokens_of
from rana_fx.skips import Note

REFINE = "refine"  # the name of this stage
_TOKENS_OF_A_RECIPE = 40_000  # trained on in the time that a recipe takes, about
_log = logging.getLogger(__name__)


def share_of(refine: Refine | None) -> dict[str, float]:
    """Its share of the time of ``adapt`` beside those of a recipe, which add up to one."""
    return {} if refine is None else {REFINE: refine.tokens / _TOKENS_OF_A_RECIPE}


def refiner_of(refine: object, recipe: Recipe, *, metric: str, seed: int) -> Refiner:
    """Of what ``adapt`` was given. Raises InvalidOption."""
    if refine is not None and not isinstance(refine, Refine):
        raise InvalidOption(name="refine", got=refine, expected="None or rana_fx.refinement.Refine(tokens=65536)")
    if refine is not None and (recipe.name in WITHOUT_LOSS or not takes_budget(recipe)):
        expected = f"None: recipe {recipe.name!r} approximates nothing, so there is nothing to train"
        raise InvalidOption(name="refine", got=refine, expected=expected)
    return Refiner(refine, metric, seed)


class Refiner:
    """Refines plans of one calibration, or none where ``refine`` is None."""

    def __init__(self, refine: Refine | None, metric: str, seed: int) -> None:
        self._refine, self._metric, self._seed = refine, metric, seed
        self._text: RefinementText | None = None

    def reading(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The batches, to be iterated over before a plan is refined. Raises TooLittleToRefine, InvalidOption."""
        if self._refine is None:
            return batches
        if self._refine.text is None:
            self._text = RefinementText(batches, self._refine.tokens)
            return self._text
        self._text = RefinementText(self._refine.text, self._refine.tokens, name="refine.text")
        self._text.read()
        return batches

    def refined(self, model: nn.Module, problem: Problem, adapters: tuple[Adapter, ...]) -> tuple[Adapter, ...]:
        """The adapters, refined where that is better; a note on it is added to the problem's ``skips``.

        Warns:
            RanaWarning: the adapters are those before, since training diverged, ran out of memory, or gained nothing.
        """
        if self._text is None:
            return adapters
        with problem.steps.stage(REFINE):
            best, said = self._tried(model, problem, adapters) if adapters else (None, "there is no adapter")
        if best is None:
            _log.warning("the plan is not refined: %s", said)
            warnings.warn(f"the plan is not refined, but as it is without: {said}", RanaWarning, stacklevel=2)
            problem.skips.append(Note("", f"not refined: {said}"))
            return adapters
        _log.info("%s", said)
        problem.skips.append(Note("", said))
        return best

    def _tried(self, model: nn.Module, problem: Problem, adapters: Sequence[Adapter]) -> tuple[tuple[Adapter, ...] | None, str]:
        """(adapters that are better, or None; what was done, or why there are none)."""
        assert self._refine is not None and self._text is not None
        pieces, held = self._text.parts()
        try:
            with torch.inference_mode(False), Holdout(model, (), ()).instrumented(problem.layout) as running:
                judge = Judge(running, problem.layout, held, self._metric)
                before = judge.of(adapters)
                if not math.isfinite(before.divergence):
                    return None, "its output is not finite on the held-out text"
                found, tokens, why = distilled(
                    running, problem.layout, adapters, pieces, judge,
                    before=before, refine=self._refine, seed=self._seed, steps=problem.steps,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            return None, "out of memory: batches of shorter texts need less"
        count = sum(map(tokens_of, held))
        if found is None:
            return None, f"on {count:,} tokens held out of the training the divergence did not surely fall ({why})"
        text = (
            f"refined on {tokens:,} tokens: divergence from the dense model {found.divergence:.4f}, before "
            f"{before.divergence:.4f}, on {count:,} others"
        )
        return _counted(adapters, before, found), text + (f"; it ended early: {why}" if why else "")


def _counted(adapters: Sequence[Adapter], before: Judged, found: Judged) -> tuple[Adapter, ...]:
    """With expected numbers of kept values that changed as the measured ones did; errors were those before."""
    made = []
    for old, new in zip(adapters, found.adapters, strict=True):
        measured = [judged.kept.get(old.name, Kept()) for judged in (before, found)]
        limits = (old.ranks, old.width, old.out)
        pairs = zip(*((kept.ranks, kept.inputs, kept.outputs) for kept in (old.expected, *measured)), limits, strict=True)
        made.append(replace(new.with_kept(Kept(*(_moved(*pair) for pair in pairs))), error=None))
    return tuple(made)


def _moved(expected: float | None, before: float | None, after: float | None, limit: int | None) -> float | None:
    if expected is None or not before or after is None or limit is None:
        return expected
    return min(float(limit), expected * after / before)
