"""recipe="rana": a Lagrangian rate allocation over all linears of the budget, without training, for any architecture.

unit        all linears of the budget that read one tensor: they share a router, or a mask of their input
loss        errors are weighted by their effect on the loss: second moments of gradients (sensitivity.py, loss_metric.py)
candidates  dense, input thresholds, rank, rank behind a masked router, static rank (candidates.py); joint ones of an MLP
            (mlp_candidate.py)
allocation  one multiplier lambda for the whole model (allocate.py), or one fraction for every unit: whichever moves the output
            less on held-out batches
budget      lambda is fitted where the adapted model, not the dense one, meets it (refine.py)
memory      samples, moments and candidates of a large model take a few gigabytes per billion parameters: rows are few and on the
            host, moments are summed as the text passes, and those of a unit are released when its candidates are made
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import ClassVar

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.samples import CAPACITY, Keep
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.options import Options
from rana_fx.recipes.rana.prepare import Prepared, prepare
from rana_fx.recipes.rana.refine import refine
from rana_fx.recipes.rana.unit_rows import ROWS
from rana_fx.recipes.rana.units import Unit, has_basis, shape_of_unit, units_of
from rana_fx.recipes.sharing import Solver
from rana_fx.recipes.stages import Stages, run_stages
from rana_fx.skips import Note, Skip

_SAMPLES = 4e9  # bytes: where samples of all rows take more, few are kept beside their second moments
_FEW = Keep(2 * ROWS, host=True, moment=True)
_WITHOUT_BASIS = Keep(4 * ROWS, host=True)


class Rana(Options):
    """The default recipe."""

    name = "rana"
    needs_holdout = True
    adapts_every_layer = True
    # of the time of ``solve``: between those of a small model on two cores and of a large one on a GPU (bench.adapt_scale)
    shares: ClassVar[Mapping[str, float]] = {"gradients": 0.37, "decompose": 0.42, "allocate": 0.18, "build": 0.03}
    once = ("gradients", "decompose")  # by ``sharing``

    def wants(self, layout: Layout) -> dict[tuple[str, ...], Keep]:
        units: dict[tuple[str, ...], list[Unit]] = {}
        for unit in units_of(layout, shared=self.shared):
            units.setdefault(layout.sites_of_group(unit[0]), []).append(unit)
        firsts = [layout.sites[found[0][0]] for found in units.values()]
        if CAPACITY * sum(site.in_features * site.weight.element_size() for site in firsts) <= _SAMPLES:
            return dict.fromkeys(units, Keep())
        based = {group: any(has_basis(*shape_of_unit(layout, unit)) for unit in found) for group, found in units.items()}
        return {group: _FEW if basis else _WITHOUT_BASIS for group, basis in based.items()}

    def solve(self, problem: Problem) -> list[Adapter]:
        return run_stages(self.stages(problem), problem.steps.stage)

    def stages(self, problem: Problem) -> Stages:
        """``solve`` in stages: gradients, decompose, allocate, build."""
        if problem.budget >= 1:
            return []
        assert problem.holdout is not None
        with problem.holdout.instrumented(problem.layout) as model:
            prepared = yield from prepare(problem, model, self)
            return (yield from refine(problem, prepared, self))

    @contextmanager
    def sharing(self) -> Iterator[Solver]:
        """Solves for several budgets of one calibration (rana_fx/recipes/sharing.py)."""
        with ExitStack() as contexts:
            yield _Sharing(self, contexts)


class _Sharing:
    """Prepares at the first budget that needs it."""

    def __init__(self, recipe: Rana, contexts: ExitStack) -> None:
        self._recipe, self._contexts = recipe, contexts
        self._prepared: tuple[Prepared, list[Skip | Note]] | None = None

    def solve(self, problem: Problem) -> list[Adapter]:
        if problem.budget >= 1:
            return []
        if self._prepared is None:
            assert problem.holdout is not None
            model = self._contexts.enter_context(problem.holdout.instrumented(problem.layout))
            own = replace(problem, skips=[])
            self._prepared = run_stages(prepare(own, model, self._recipe), problem.steps.stage), own.skips
        prepared, skips = self._prepared
        problem.skips += skips
        return run_stages(refine(problem, prepared, self._recipe, keep=True), problem.steps.stage)
