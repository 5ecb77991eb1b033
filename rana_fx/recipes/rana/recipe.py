"""recipe="rana": the best known use of a budget, without training, for any architecture.

unit        all linears of the budget that read one tensor: they share a router, or a mask of their input
loss        errors are weighed by what they do to the loss: second moments of gradients (sensitivity.py, geometry.py)
menu        dense, input thresholds, rank, rank behind a masked router, static rank (menu.py); a cut through an MLP (cut.py)
allocation  one price of a unit of cost for the whole model (allocate.py), or one fraction for every unit: what moves the
            model's output less on held-out batches
budget      the price is set where the adapted model, not the dense one, keeps what was asked
memory      what a large model's samples, moments and menus take together is a few gigabytes per billion parameters: rows are few
            and on the host, moments are summed as the text passes, and a unit's are dropped when its menu is made
"""

from __future__ import annotations

from dataclasses import dataclass

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.samples import CAPACITY, Keep
from rana_fx.calibration.sensitivity import Sensitivity, sensitivities
from rana_fx.graph.linears import Skip
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.eligible_mlps import Cuttable, cuttables
from rana_fx.recipes.rana.make_candidates import ROWS, average, has_basis, menus_of, shape_of_unit
from rana_fx.recipes.rana.operating_point import Unit
from rana_fx.recipes.rana.quantization import KINDS
from rana_fx.recipes.rana.refine import ALLOCATIONS, search
from rana_fx.recipes.stages import Stages, run_stages

_SAMPLES = 4e9  # bytes: where samples of all rows take more, few are kept beside their second moments
_FEW = Keep(2 * ROWS, host=True, moment=True)
_WITHOUT_BASIS = Keep(4 * ROWS, host=True)


@dataclass(frozen=True, kw_only=True)
class Rana:
    """The default recipe; its fields are ingredients that can be left out, to see what each is worth (bench/quality/ablation.py).

    Args:
        weighted: errors count by what they do to the loss; False: all alike.
        shared: linears that read one tensor are one unit; False: each is one of its own.
        kinds: entries of the menu.
        gates: the gate of a cut is adapted by itself; False: it stays dense.
        bits: in how many bits matrices may lie beside the model's own, with ``metric="bytes"``.
        carried: what rounding a row in 4 bits loses is made up for by the next rows; False: each is rounded to nearest.
        allocations: those that are tried, "price" and "fraction".
        settles: the price is set again until the adapted model costs what was asked; False: the menus' word is taken.
    """

    weighted: bool = True
    shared: bool = True
    kinds: tuple[str, ...] = KINDS
    gates: bool = True
    bits: tuple[int, ...] = (8, 4)
    carried: bool = True
    allocations: tuple[str, ...] = ALLOCATIONS
    settles: bool = True

    name = "rana"
    rehearses = True
    adapts_every_layer = True

    def wants(self, layout: Layout) -> dict[tuple[str, ...], Keep]:
        units: dict[tuple[str, ...], list[Unit]] = {}
        for unit in units_of(layout, shared=self.shared):
            units.setdefault(layout.groups[layout.sites[unit[0]].group].sites, []).append(unit)
        firsts = [layout.sites[found[0][0]] for found in units.values()]
        if CAPACITY * sum(site.in_features * site.weight.element_size() for site in firsts) <= _SAMPLES:
            return dict.fromkeys(units, Keep())
        based = {group: any(has_basis(*shape_of_unit(layout, unit)) for unit in found) for group, found in units.items()}
        return {group: _FEW if basis else _WITHOUT_BASIS for group, basis in based.items()}

    def solve(self, problem: Problem) -> list[Adapter]:
        return run_stages(self.stages(problem))

    def stages(self, problem: Problem) -> Stages:
        """``solve`` in named stages: gradients, decompose, allocate, build."""
        if problem.budget >= 1:
            return []
        assert problem.rehearsal is not None
        units = units_of(problem.layout, shared=self.shared)
        units = [unit for unit in units if problem.calibrated(unit, 1) and _varied(problem, unit)]
        with problem.rehearsal.opened(problem.layout) as stage:
            yield "gradients"
            batches = problem.rehearsal.batches
            gates = [(cut.gate,) for cut in self.cuttable(problem, units) if cut.kind == "gated" and self.gates]
            asked = list(dict.fromkeys([*units, *gates]))
            found = sensitivities(stage, problem.layout, asked, batches) if self.weighted else Sensitivity()
            if found.missing:
                alike = "errors of all layers count alike" if not found.moments else "there errors count as on average"
                problem.note(f"what errors do to the output could not be measured everywhere, so {alike}: {found.missing}")
            even = average(problem, found)
            yield "decompose"
            menus = menus_of(self, problem, units, found, even)
            return (yield from search(problem, stage, menus, allocations=self.allocations, settles=self.settles))

    def cuttable(self, problem: Problem, units: list[Unit]) -> list[Cuttable]:
        """Blocks that a cut may go through."""
        return cuttables(problem.layout, units, self.kinds)


def units_of(layout: Layout, *, shared: bool = True) -> list[Unit]:
    """Sites of the budget that read one tensor equally often, stacked; unless ``shared``, each by itself."""
    found: dict[tuple[int, int, str], list[str]] = {}
    for site in layout.sites.values():
        if site.counted:
            found.setdefault((site.group, site.uses, "" if shared else site.name), []).append(site.name)
    return [tuple(names) for names in found.values()]


def _varied(problem: Problem, unit: Unit) -> bool:
    """Whether the unit's input differs from token to token; one that does not is said to stay dense."""
    rows = problem.rows(unit[0])
    if not bool(rows.any()):
        reason = "its input is zero throughout the calibration text: it stays dense"
    elif bool((rows == rows[0]).all()):
        reason = f"its input is the same for all {len(rows)} calibration tokens: it stays dense"
    else:
        return True
    problem.skips += [Skip(name, reason) for name in unit]
    return False
