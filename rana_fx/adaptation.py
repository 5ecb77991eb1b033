"""``adapt``: calibrate, decompose, allocate, attach, on one screen."""

from __future__ import annotations

import importlib.metadata
import numbers
import platform
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rana_fx.calibration.batches import check_batches
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.probe import Keeper
from rana_fx.errors import AlreadyAdapted, BudgetOutOfRange, UnknownMetric, UnknownRecipe
from rana_fx.graph.linears import Skip
from rana_fx.modules import unwrap
from rana_fx.plan import METRICS, Plan, SiteRecord, weight_digest
from rana_fx.recipes import RECIPES, Problem
from rana_fx.runtime.attachment import attach, attached


def adapt(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float = 0.58,
    metric: str = "flops",
    recipe: str = "rana",
    progress: bool = True,
    seed: int = 0,
) -> Plan:
    """Measure a model on a few batches, decide how much of every linear layer each token needs, and attach that plan.

    Args:
        model: any module that runs under torch.compile, also one that torch.compile or DataParallel wraps. Its weights and
            code are not changed.
        batches: what the model takes, one pytree per call: a mapping is called as ``model(**batch)``, a tuple or list as
            ``model(*batch)``, anything else as ``model(batch)``. Tensors are moved to the model's device. Tokens whose
            ``*attention_mask`` is zero do not count. The paper uses 32,000 tokens; at most so many are kept, drawn
            uniformly from all that pass.
        budget: expected cost per token of all linears inside the blocks, router included, over their dense cost, in (0, 1].
        metric: "flops" (multiply-adds) or "bytes" (weight bytes read).
        recipe: a name in ``rana_fx.recipes.RECIPES``: "rana", candidates allocated over the whole model; "paper" (RaNA as
            published), or a baseline (docs/recipes.md).
        seed: of the token sample.

    Returns:
        The plan, attached to the model: compile with ``torch.compile(model, backend=rana_fx.backend)``. Code that
        torch.compile made earlier in this process is compiled again on its next call.

    Raises:
        BudgetOutOfRange, BudgetUnreachable, UnknownMetric, UnknownRecipe, AlreadyAdapted, NoBatches, NoLinears,
        TooFewTokens, NonFinite, TraceFailed, InvalidOption (``batches`` is one batch).

    Example:
        >>> plan = rana_fx.adapt(model, batches, budget=0.58)
        >>> fast = torch.compile(model, backend=rana_fx.backend)
    """
    if not isinstance(budget, numbers.Real) or isinstance(budget, bool) or not 0 < budget <= 1:
        raise BudgetOutOfRange(budget=budget)
    if metric not in METRICS:
        raise UnknownMetric(kind="metric", got=metric, valid=", ".join(METRICS))
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise UnknownRecipe(kind="recipe", got=recipe, valid=", ".join(RECIPES))
    model = unwrap(model)
    present = attached(model)
    if present is not None:
        old = present.plan
        raise AlreadyAdapted(model=type(model).__name__, recipe=old.recipe, budget=old.budget, digest=old.digest()[:12])
    chosen = RECIPES[recipe]
    keeper = Keeper(check_batches(batches)) if chosen.rehearses else None
    layout, samples, tokens = calibrate(model, keeper or batches, wanted=chosen.wants, seed=seed, progress=progress)
    rehearsal = None if keeper is None else keeper.rehearsal(model)
    problem = Problem(layout, samples, float(budget), metric, recipe, progress, rehearsal=rehearsal)
    with torch.no_grad():
        adapters = tuple(chosen.solve(problem))
    plan = Plan(
        recipe=recipe,
        metric=metric,
        budget=float(budget),
        seed=seed,
        tokens=tokens,
        model=type(model).__name__,
        versions=versions(),
        sites=records(layout),
        adapters=adapters,
        skips=_skips(layout, problem.skips),
    )
    attach(model, plan)
    return plan


def records(layout: Layout) -> tuple[SiteRecord, ...]:
    """The fingerprint of every linear."""
    return tuple(
        SiteRecord(
            site.name, site.role, site.op, site.out_features, site.in_features, site.transposed, site.uses, site.counted,
            str(site.weight.dtype).removeprefix("torch."), weight_digest(site.weight),
        )
        for site in layout.sites.values()
    )  # fmt: skip


def _skips(layout: Layout, chosen: list[Skip]) -> tuple[Skip, ...]:
    reasons = {
        "head": "outside the blocks: it follows the last residual join",
        "stem": "outside the blocks: it makes the stream that the blocks add to",
        "constant": "it reads nothing of the batch, so its cost is not one per token",
        "router": "its output selects experts",
    }
    outside = [Skip(site.name, reasons[site.role]) for site in layout.sites.values() if site.role in reasons]
    return tuple(dict.fromkeys([*layout.skips, *outside, *chosen]))


def versions() -> dict[str, str]:
    """Versions that a plan or a report records."""
    found = {"python": platform.python_version()}
    for package in ("rana_fx", "torch", "triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
