"""``adapt``: calibrate, solve, build the plan, attach it.

Each step is a function of its own, for sweeps that calibrate once for many plans and for benches that time the steps:

    calibration = calibrated(model, batches, recipe)
    problem = calibration.problem(budget=0.5, metric="flops", recipe=recipe.name)
    plan = planned(calibration, problem, solved(problem, recipe))
    attach(model, plan)
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import nn

from rana_fx._version import versions
from rana_fx.adapter import Adapter
from rana_fx.asked import Asked, asked_of
from rana_fx.calibration.autocast import autocast_as
from rana_fx.calibration.batches import check_batches
from rana_fx.calibration.calibrate import CALIBRATE, calibrate
from rana_fx.calibration.holdout import Holdout, Tee
from rana_fx.calibration.layout import OUTSIDE_OF_GRAPHS, Layout, Unread
from rana_fx.calibration.records import records
from rana_fx.calibration.samples import Reservoir
from rana_fx.calibration.selection import Patterns, Selection
from rana_fx.calibration.withheld import Withheld
from rana_fx.cost import METRICS, SCOPES
from rana_fx.errors import AlreadyAdapted, InvalidOption, UnknownChoice, UnknownMetric
from rana_fx.measured_plans import PLANS, SEARCHED, measured_plans
from rana_fx.modules import trainable_tensors, unwrap, weights_of
from rana_fx.plan import Plan, SiteRecord
from rana_fx.progress import Callback, Progress, following
from rana_fx.recipes import Problem, Recipe, needs_holdout, recipe_of, takes_budget, title_of
from rana_fx.recipes.held_out_quality import held_out_quality
from rana_fx.recipes.selected import in_budgets_of_all, selected
from rana_fx.recipes.sharing import Solver, sharing
from rana_fx.refinement import Refine
from rana_fx.refinement.refined import Refiner, refiner_of, share_of
from rana_fx.runtime.attachment import attach, attached
from rana_fx.skips import Note, Skip, typed

_SOLVE, _PLAN = "solve", "plan"  # stages
# of the time of ``adapt``: between those of a small model on two cores and of a large one on a GPU (bench.adapt_scale)
_CALIBRATING, _SOLVING, _PLANNING = 0.2, 0.7, 0.1
_NAMED = 5  # modules that one note names
IS_TABLE = "its weight is also the table of an embedding, which stays as it is"


@overload
def adapt(
    model: nn.Module, batches: Iterable[Any], *, budgets: Sequence[float], metric: str = ..., recipe: str | Recipe = ...,
    scope: str = ..., skip: Patterns = ..., only: Patterns = ..., held_out: Iterable[Any] | None = ...,
    refine: Refine | None = ..., progress: bool | Callback = ..., seed: int = ...,
) -> list[Plan]: ...  # fmt: skip


@overload
def adapt(
    model: nn.Module, batches: Iterable[Any], *, budget: float | None = ..., max_kl: float | None = ...,
    max_loss: float | None = ..., max_ppl_increase: float | None = ..., metric: str = ..., recipe: str | Recipe = ...,
    scope: str = ..., skip: Patterns = ..., only: Patterns = ..., held_out: Iterable[Any] | None = ...,
    refine: Refine | None = ..., progress: bool | Callback = ..., seed: int = ...,
) -> Plan: ...  # fmt: skip


def adapt(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float | None = None,
    budgets: Sequence[float] | None = None,
    max_kl: float | None = None,
    max_loss: float | None = None,
    max_ppl_increase: float | None = None,
    metric: str = "flops",
    recipe: str | Recipe = "rana",
    scope: str = "blocks",
    skip: Patterns = (),
    only: Patterns = (),
    held_out: Iterable[Any] | None = None,
    refine: Refine | None = None,
    progress: bool | Callback = True,
    seed: int = 0,
) -> Plan | list[Plan]:
    """Calibrate a model on a few batches, distribute a budget over its linear layers, and attach the resulting plan.

    Args:
        model: any module that runs under torch.compile, also one that torch.compile or DataParallel wraps. Its weights and
            code are not changed.
        batches: what the model takes, one pytree per call: a mapping is called as ``model(**batch)``, a tuple or list as
            ``model(*batch)``, anything else as ``model(batch)``. Tensors are moved to the model's device. Tokens whose
            ``*attention_mask`` is zero do not count. The paper uses 32,000 tokens; at most 32,000 are kept, a
            uniform sample of all tokens of the batches.
        budget: expected cost per token of all linears that it counts, router included, over their dense cost, in (0, 1]. Default
            0.58, where none of the next four is given; they exclude each other. Recipe "exact" ignores it: the plan's budget is
            the expected cost that was reached.
        budgets: several of them: one calibration, a plan for each.
        max_kl: instead of a budget, the cheapest plan whose mean KL divergence from the dense model stays below it, in nats per
            token. The promise is the upper end of the 95 % confidence interval on held-out documents (rana_fx/targets.py).
        max_loss: the same for the increase of the next-token loss, in nats per token (log of the ratio of perplexities).
        max_ppl_increase: the same for the increase of the perplexity, exp(loss per token), in points, as tables of perplexities
            give it: from 5.5 to 6.0 it is 0.5.
        metric: "flops" (multiply-adds) or "bytes" (weight bytes read).
        recipe: a name in ``rana_fx.recipes.RECIPES``: "rana", candidates allocated over the whole model; "paper" (RaNA as
            published), "exact" (skips zeros alone, at no loss), or a baseline (docs/explanation/recipes.md). Or a recipe with
            options of its own: ``rana_fx.recipes.Rana(shared=False)``.
        scope: which linears the budget counts: "blocks", those inside the blocks; "all", output heads and stems as well.
        skip: linears that stay dense: a pattern of names of weights or of modules around them, or several ("*.down_proj",
            "model.layers.0"). The budget counts them, as dense.
        only: if given, all linears stay dense that match none of these.
        held_out: batches of other text, to measure plans of ``budgets`` and targets on; each row is taken for a document, so rows
            of one document make the interval too narrow. Default: every fourth of ``batches``, at most some 16,000 tokens, which
            calibration then does not see. Not used with ``budget``, which measures nothing.
        refine: ``rana_fx.refinement.Refine(tokens=...)`` distils each plan from the dense model, on ``batches`` but their last
            fourth, and keeps what comes of it if that loses less on the last fourth (docs/explanation/recipes.md).
        progress: True draws a bar on stderr, with an estimate of the time left; False is silent. A function is called with a
            ``rana_fx.progress.Step`` at each step instead. The stages are logged to "rana_fx.progress" in any case.
        seed: of the token sample.

    Returns:
        The plan, attached to the model: compile with ``torch.compile(model, backend=rana_fx.backend)``. Code that
        torch.compile made earlier in this process is compiled again on its next call.
        With ``budgets`` a list of plans in their order, none of them attached. Each is the plan of that ``budget`` alone (of the
        same text: without ``held_out`` a part of it is withheld), and has all measurements in ``Plan.curve``.

    Raises:
        BudgetOrTarget, TargetNotPositive, TargetUnreachable, TargetNotMeasurable, TooFewHeldOut (of targets).
        BudgetOutOfRange, BudgetUnreachable, NothingToSkip (recipe "exact": there are no zeros), UnknownMetric, UnknownRecipe,
        UnknownChoice (``scope``), NoSuchLinear (a pattern that matches nothing), AlreadyAdapted, NoBatches, NoLinears,
        TooFewTokens, NonFinite, TraceFailed, CompilationDisabled, WeightAbsent, InvalidOption (``batches`` is one batch),
        TooLittleToRefine.

    Example:
        >>> plan = rana_fx.adapt(model, batches, budget=0.58)
        >>> fast = torch.compile(model, backend=rana_fx.backend)
    """
    asked = asked_of(budget, budgets, {"max_kl": max_kl, "max_loss": max_loss, "max_ppl_increase": max_ppl_increase})
    chosen = _check_options(metric, recipe, scope, progress)
    if asked.measured and not takes_budget(chosen):
        expected = "a recipe that takes a budget; of this one there is one plan, at no loss: leave out budgets and targets"
        raise InvalidOption(name="recipe", got=title_of(chosen), expected=expected)
    seed = _checked_seed(seed)
    refiner = refiner_of(refine, chosen, metric=metric, seed=seed)
    model = unwrap(model)
    selection = Selection.of(skip, only)
    named = {name: weight for name, weight in weights_of(model).items() if not nn.parameter.is_lazy(weight)}
    selection.check([name for name, weight in named.items() if weight.dim() >= 2], type(model).__name__)
    _check_not_adapted(model)
    with following(progress, title="adapt", shares=_shares(chosen, asked, refine)) as steps:
        with trainable_tensors(model):
            text = Withheld(batches, held_out) if asked.measured else batches
            read = refiner.reading(text)
            calibration = calibrated(model, read, chosen, scope=scope, seed=seed, progress=steps, selection=selection)
            problem_at = functools.partial(calibration.problem, metric=metric, recipe=title_of(chosen), progress=steps)
            if isinstance(text, Withheld):
                plans = _measured(model, calibration, chosen, asked, text.batches(), problem_at, refiner)
            else:
                problem = problem_at(budget=asked.budgets[0] if takes_budget(chosen) else 1.0)
                adapters = refiner.refined(model, problem, solved(problem, chosen))
        if asked.many:
            return plans
        with steps.stage(_PLAN):
            plan = plans[0] if asked.measured else planned(calibration, problem, adapters)
            if not takes_budget(chosen):
                plan = replace(plan, budget=plan.expected_budget())
            attach(model, plan)
    return plan


def _measured(
    model: nn.Module,
    calibration: CalibratedModel,
    recipe: Recipe,
    asked: Asked,
    held_out: Sequence[Any],
    problem_at: functools.partial[Problem],
    refiner: Refiner,
) -> list[Plan]:
    """Plans with what they lose on held-out batches; what no budget changes is computed once."""
    metric, title, steps = (problem_at.keywords[name] for name in ("metric", "recipe", "progress"))

    def plan_at(budget: float) -> Plan:
        problem = problem_at(budget=budget)
        return planned(calibration, problem, refiner.refined(model, problem, solved(problem, solver)))

    with sharing(recipe) as solver, held_out_quality(model, calibration.layout, held_out) as quality:
        return measured_plans(asked, plan_at, quality, model=calibration.model, recipe=title, metric=metric, steps=steps)


@dataclass(frozen=True, eq=False)
class CalibratedModel:
    """The result of calibrating a model, for any number of plans.

    Attributes:
        model: the name of its class. tokens: number of calibration tokens, padding not counted. seed: of the sample.
        samples: by the sites of a group, rows of the tensor that the group reads.
        holdout: batches to run the model on again, for recipes that simulate their adapters.
        hashed: False to leave digests of weights out of the records of plans that will not be loaded.
        scope: which linears the budget counts (``cost.SCOPES``), as in the layout. selection: those that a recipe may adapt.
    """

    model: str
    layout: Layout
    samples: Mapping[tuple[str, ...], Reservoir]
    tokens: int
    seed: int
    holdout: Holdout | None = None
    hashed: bool = True
    scope: str = "blocks"
    selection: Selection = Selection()

    def problem(self, *, budget: float, metric: str, recipe: str, progress: bool | Progress = False) -> Problem:
        """The input of a recipe: this calibration with one budget.

        Raises:
            BudgetUnreachable: the linears that the selection leaves dense cost more than the budget.
        """
        problem = Problem(self.layout, self.samples, budget, metric, recipe, progress, holdout=self.holdout)
        return selected(problem, self.selection) if self.selection else problem

    @functools.cached_property
    def sites(self) -> tuple[SiteRecord, ...]:
        """The fingerprint of every linear; computed, from the weights, on first access."""
        return records(self.layout, hashed=self.hashed)


def calibrated(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    scope: str = "blocks",
    seed: int = 0,
    progress: bool | Progress = False,
    selection: Selection = Selection(),  # noqa: B008 - frozen
) -> CalibratedModel:
    """Run the model on ``batches`` and sample the tensors that ``recipe.wants`` selects, of linears that it may adapt.

    Raises:
        NoBatches, NoLinears, NonFinite, TraceFailed, InvalidOption, NoSuchLinear.
    """

    def wanted(layout: Layout) -> Collection[tuple[str, ...]]:
        return recipe.wants(selection.applied(layout))

    tee = Tee(check_batches(batches)) if needs_holdout(recipe) else None
    found = calibrate(model, batches if tee is None else tee, wanted=wanted, scope=scope, seed=seed, progress=progress)
    holdout = None if tee is None else tee.holdout(model)
    name = type(unwrap(model)).__name__
    selection.check([site.name for site in found.layout.sites.values() if site.counted], name)
    return CalibratedModel(name, found.layout, found.samples, found.tokens, seed, holdout, scope=scope, selection=selection)


def solved(problem: Problem, recipe: Solver) -> tuple[Adapter, ...]:
    """The recipe's adapters. Raises BudgetUnreachable, TooFewTokens."""
    # a recipe with stages of its own names them
    stage = nullcontext() if hasattr(recipe, "shares") else problem.steps.stage(_SOLVE)
    with torch.no_grad(), autocast_as(()), stage, in_budgets_of_all(problem):
        return tuple(recipe.solve(problem))


def planned(calibration: CalibratedModel, problem: Problem, adapters: Sequence[Adapter]) -> Plan:
    """The plan of a solved problem."""
    return Plan(
        recipe=problem.recipe,
        metric=problem.metric,
        budget=problem.budget if problem.asked is None else problem.asked,
        seed=calibration.seed,
        tokens=calibration.tokens,
        model=calibration.model,
        versions=versions(),
        sites=calibration.sites,
        adapters=tuple(adapters),
        skips=_skips(calibration.layout, problem.skips, adapters),
        scope=calibration.scope,
    )


def _shares(recipe: Recipe, asked: Asked, refine: Refine | None) -> dict[str, float]:
    """Expected shares of the time of ``adapt`` by stage, in order."""
    inside: Mapping[str, float] = {**getattr(recipe, "shares", {_SOLVE: 1.0}), **share_of(refine)}
    if asked.measured:
        once = getattr(recipe, "once", ())
        each = sum(share for name, share in inside.items() if name not in once)
        inside = {name: inside[name] for name in once} | {PLANS: each * (len(asked.budgets) or SEARCHED)}
    shares = {CALIBRATE: _CALIBRATING} | {name: share * _SOLVING for name, share in inside.items()}
    return shares if asked.many else shares | {_PLAN: _PLANNING}


def _check_options(metric: str, recipe: object, scope: str, progress: object) -> Recipe:
    if metric not in METRICS:
        raise UnknownMetric(kind="metric", got=metric, valid=", ".join(METRICS))
    if not isinstance(progress, bool) and not callable(progress):
        raise InvalidOption(name="progress", got=progress, expected="True, False or a function of a rana_fx.progress.Step")
    if scope not in SCOPES:
        raise UnknownChoice(kind="scope", got=scope, valid=", ".join(SCOPES))
    return recipe_of(recipe)


def _checked_seed(seed: object) -> int:
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not -(2**63) <= int(seed) < 2**63:
        raise InvalidOption(name="seed", got=seed, expected="an integer of 64 bits")
    return int(seed)


def _check_not_adapted(model: nn.Module) -> None:
    present = attached(model)
    if present is not None:
        old = present.plan
        raise AlreadyAdapted(model=type(model).__name__, recipe=old.recipe, budget=old.budget, digest=old.digest()[:12])


def _skips(layout: Layout, chosen: Sequence[Skip | Note], adapters: Sequence[Adapter]) -> tuple[Skip | Note, ...]:
    reasons = {
        "head": "outside the blocks: it follows the last residual join",
        "stem": "outside the blocks: it makes the stream that the blocks add to",
        "constant": "it reads nothing of the batch, so its cost is not one per token",
        "router": "its output selects experts",
    }
    outside = [Skip(site.name, reasons[site.role]) for site in layout.sites.values() if not site.counted]
    adapted = {name for adapter in adapters for name in adapter.sites}
    # a weight with a note is not freed (rana_fx/runtime/replaced_weights.py)
    tables = [Note(site.name, IS_TABLE) for site in layout.sites.values() if site.is_table and site.name in adapted]
    return tuple(dict.fromkeys([*layout.skips, *outside, *map(typed, chosen), *tables, *_unread(layout.unread)]))


def _unread(unread: Sequence[Unread]) -> list[Skip | Note]:
    """A skip for each module whose matrices no graph reads, and a note on the plan that names the first of them."""
    found: list[Skip | Note] = []
    for eager, fate in ((False, "ran in no batch"), (True, OUTSIDE_OF_GRAPHS)):
        modules = [item for item in unread if item.eager == eager]
        if modules:
            more = f" and of {len(modules) - _NAMED} more modules" if len(modules) > _NAMED else ""
            named = ", ".join(item.linears for item in modules[:_NAMED])
            found.append(Note("", f"{named}{more} {fate}: they stay dense, outside of the budget"))
        found += [Skip(item.module, f"{item.linears} {fate}" if item.count > 1 else fate) for item in modules]
    return found
