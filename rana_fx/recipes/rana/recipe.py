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

import functools
from collections.abc import Mapping
from typing import ClassVar

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.samples import CAPACITY, Keep
from rana_fx.calibration.sensitivity import Sensitivity, sensitivities
from rana_fx.graph.linears import Skip
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.eligible_mlps import eligible_mlps
from rana_fx.recipes.rana.make_candidates import make_decisions
from rana_fx.recipes.rana.options import Options
from rana_fx.recipes.rana.refine import refine
from rana_fx.recipes.rana.unit_rows import ROWS
from rana_fx.recipes.rana.units import Unit, has_basis, shape_of_unit, units_of
from rana_fx.recipes.stages import Stages, run_stages

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
        units = units_of(problem.layout, shared=self.shared)
        units = [unit for unit in units if problem.calibrated(unit, 1) and _varied(problem, unit)]
        with problem.holdout.instrumented(problem.layout) as stage:
            yield "gradients"
            mlps = eligible_mlps(problem.layout, units, self.kinds) if self.gates else []
            measured = list(dict.fromkeys([*units, *((mlp.gate,) for mlp in mlps if mlp.kind == "gated")]))
            batches, held = problem.holdout.batches, problem.holdout.held
            measure = functools.partial(sensitivities, stage, problem.layout, measured, steps=problem.steps)
            found = measure(batches, held=held) if self.weighted else Sensitivity()
            if found.missing:
                alike = "errors of all layers count alike" if not found.moments else "there errors count as on average"
                problem.note(f"what errors do to the output could not be measured everywhere, so {alike}: {found.missing}")
            yield "decompose"
            decisions = make_decisions(self, problem, units, found)
            return (yield from refine(problem, stage, decisions, self))


def _varied(problem: Problem, unit: Unit) -> bool:
    """Whether the unit's input differs from token to token; otherwise it stays dense, with the reason in ``skips``."""
    rows = problem.rows(unit[0])
    if not bool(rows.any()):
        reason = "its input is zero throughout the calibration text: it stays dense"
    elif bool((rows == rows[0]).all()):
        reason = f"its input is the same for all {len(rows)} calibration tokens: it stays dense"
    else:
        return True
    problem.skips += [Skip(name, reason) for name in unit]
    return False
