"""recipe="rana": the best known use of a budget, without training, for any architecture.

unit        all linears of the budget that read one tensor: they share a router, or a mask of their input
loss        errors are weighed by what they do to the loss: second moments of gradients (sensitivity.py, geometry.py)
menu        dense, input thresholds, rank, rank behind a masked router, static rank (menu.py); a cut through a gated MLP (cut.py)
allocation  one price of a unit of cost for the whole model (allocate.py), or one fraction for every unit: what moves the
            model's output less on held-out batches
budget      the price is set where the adapted model, not the dense one, keeps what was asked
memory      what a large model's samples, moments and menus take together is a few gigabytes per billion parameters: rows are few
            and on the host, moments are summed as the text passes, and a unit's are dropped when its menu is made
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rana_fx.adapters import Adapter
from rana_fx.decompose import second_moment
from rana_fx.layout import Layout
from rana_fx.recipes.cut import Cut, Share, cuttables
from rana_fx.recipes.geometry import Geometry, geometry, loss_basis, site_norms
from rana_fx.recipes.menu import Menu, Part
from rana_fx.recipes.point import Unit
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.search import ALLOCATIONS, search
from rana_fx.recipes.storage import KINDS, in_fewer_bits, own
from rana_fx.sensitivity import Sensitivity, sensitivities
from rana_fx.sites import Skip
from rana_fx.stats import CAPACITY, Keep, Summary

_ROWS = 2048  # rows a menu is priced on
_BASIS_ROWS = 8192  # rows, or eight for every input, a basis is made from
_SAMPLES = 4e9  # bytes: where samples of all rows take more, few are kept beside their second moments
_FEW_DIRECTIONS = 32  # an input that lies in fewer is worth a remark
_FEW = Keep(2 * _ROWS, host=True, moment=True)
_WITHOUT_BASIS = Keep(4 * _ROWS, host=True)


@dataclass(frozen=True, kw_only=True)
class Rana:
    """The default recipe; its fields are ingredients that can be left out, to see what each is worth (bench/ablation.py).

    Args:
        weighted: errors count by what they do to the loss; False: all alike.
        shared: linears that read one tensor are one unit; False: each is one of its own.
        kinds: entries of the menu.
        bits: in how many bits matrices may lie beside the model's own, with ``metric="bytes"``.
        carried: what rounding a row in 4 bits loses is made up for by the next rows; False: each is rounded to nearest.
        allocations: those that are tried, "price" and "fraction".
        settles: the price is set again until the adapted model costs what was asked; False: the menus' word is taken.
    """

    weighted: bool = True
    shared: bool = True
    kinds: tuple[str, ...] = KINDS
    bits: tuple[int, ...] = (8, 4)
    carried: bool = True
    allocations: tuple[str, ...] = ALLOCATIONS
    settles: bool = True

    name = "rana"
    rehearses = True

    def wants(self, layout: Layout) -> dict[tuple[str, ...], Keep]:
        units: dict[tuple[str, ...], list[Unit]] = {}
        for unit in units_of(layout, shared=self.shared):
            units.setdefault(layout.groups[layout.sites[unit[0]].group].sites, []).append(unit)
        firsts = [layout.sites[found[0][0]] for found in units.values()]
        if CAPACITY * sum(site.in_features * site.weight.element_size() for site in firsts) <= _SAMPLES:
            return dict.fromkeys(units, Keep())
        based = {group: any(_has_basis(*_shape(layout, unit)) for unit in found) for group, found in units.items()}
        return {group: _FEW if basis else _WITHOUT_BASIS for group, basis in based.items()}

    def solve(self, problem: Problem) -> list[Adapter]:
        if problem.budget >= 1:
            return []
        assert problem.rehearsal is not None
        units = units_of(problem.layout, shared=self.shared)
        units = [unit for unit in units if problem.calibrated(unit, 1) and _varied(problem, unit)]
        with problem.rehearsal.opened(problem.layout) as stage:
            with problem.within("gradients"):
                batches = problem.rehearsal.batches
                found = sensitivities(stage, problem.layout, units, batches) if self.weighted else Sensitivity()
            if found.missing:
                alike = "errors of all layers count alike" if not found.moments else "there errors count as on average"
                problem.note(f"what errors do to the output could not be measured everywhere, so {alike}: {found.missing}")
            even = _average(problem, found)
            with problem.within("decompose"):
                menus = _menus(self, problem, units, found, even)
            return search(problem, stage, menus, allocations=self.allocations, settles=self.settles)


def units_of(layout: Layout, *, shared: bool = True) -> list[Unit]:
    """Sites of the budget that read one tensor equally often, stacked; unless ``shared``, each by itself."""
    found: dict[tuple[int, int, str], list[str]] = {}
    for site in layout.sites.values():
        if site.counted:
            found.setdefault((site.group, site.uses, "" if shared else site.name), []).append(site.name)
    return [tuple(names) for names in found.values()]


def _shape(layout: Layout, unit: Unit) -> tuple[int, int]:
    """(outputs, inputs)."""
    return sum(layout.sites[name].out_features for name in unit), layout.sites[unit[0]].in_features


def _has_basis(out: int, width: int) -> bool:
    """A router as tall as the layer is wide saves nothing."""
    return out > width // 2


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


def _average(problem: Problem, found: Sensitivity) -> float | None:
    """What a unit of error of an output costs in the middle one of the units where that is known."""
    known = sorted(_even(problem.matrix(unit), moment) for unit, moment in found.moments.items()) if found.missing else []
    return known[len(known) // 2] if known else None


def _even(weight: Tensor, moment: Tensor) -> float:
    out, width = weight.shape
    return float(moment.diagonal().sum()) / (float(weight.square().sum()) if out > width else out)


def _menus(recipe: Rana, problem: Problem, units: list[Unit], found: Sensitivity, even: float | None) -> dict[Unit, Menu]:
    """Samples kept on the host, those of a large model, are given back as they have served."""
    last = {problem.sample(unit[0]): unit for unit in units}
    cuttable = {found.lead: found for found in cuttables(problem.layout, units)} if "gated" in recipe.kinds else {}
    menus: dict[Unit, Menu] = {}
    for unit in tqdm(units, desc="decompose", unit="group", disable=not problem.progress):
        menus[unit], shape = _menu(recipe, problem, unit, found, even)
        if unit in cuttable and all(other in menus for other in cuttable[unit].units):
            cut = Cut(problem, cuttable[unit], menus[cuttable[unit].source].rows_TI, shape)
            for other in cuttable[unit].units:
                menus[other].cut = Share(cut, other)
        del shape
        sample = problem.sample(unit[0])
        if sample is not None and sample.host and last[sample] == unit:
            sample.forget()
    return menus


def _menu(recipe: Rana, problem: Problem, unit: Unit, found: Sensitivity, even: float | None) -> tuple[Menu, Geometry]:
    """Its basis is from other rows than those it is priced on: principal directions of some text fit other text less well."""
    weight = problem.matrix(unit)
    out, width = weight.shape
    moment_II, count, rows = _statistics(problem, unit)
    shape = geometry(weight, found.moments.pop(unit, None), even=even)
    site = problem.layout.sites[unit[0]]
    one = float(site.uses * (1 if problem.metric == "flops" else site.weight.element_size()))
    basis = None
    if _has_basis(out, width):
        if moment_II is not None:
            basis = loss_basis(shape, moment_II)
            seen = _directions(rows)
            if seen < min(_FEW_DIRECTIONS, min(out, width) // 2):
                _remark(problem, unit, f"its input spans {seen} of {width} directions in the calibration text")
        else:
            _remark(problem, unit, f"{count} calibration tokens are too few for its {min(out, width)} ranks")
    storages = [own(one)]
    if problem.metric == "bytes":
        weights = {name: problem.matrix((name,)) for name in unit}
        whole_II = _moment(_spread(problem.rows(unit[0]), max(_BASIS_ROWS, 4 * width)), rows) if moment_II is None else moment_II
        storages += in_fewer_bits(
            shape, basis, weights, whole_II, one=one, uses=site.uses, bits=recipe.bits, carried=recipe.carried
        )
    storages = [replace(storage, kinds=tuple(kind for kind in storage.kinds if kind in recipe.kinds)) for storage in storages]
    return Menu(shape, basis, rows, storages, _parts(problem, unit, found, shape), dtype=site.weight.dtype), shape


def _directions(rows_TI: Tensor) -> int:
    """In how many directions rows lie, as far as twice ``_FEW_DIRECTIONS`` of them can tell."""
    some = torch.nn.functional.normalize(_spread(rows_TI, 8 * _FEW_DIRECTIONS).float(), dim=1)
    generator = torch.Generator().manual_seed(0)
    views_IK = torch.randn(some.shape[1], 2 * _FEW_DIRECTIONS, generator=generator).to(some.device)
    sizes = torch.linalg.svdvals(some @ views_IK)
    return int((sizes > max(1e-4, 4 * torch.finfo(rows_TI.dtype).eps) * sizes[0]).sum())


def _remark(problem: Problem, unit: Unit, text: str) -> None:
    for name in unit:
        problem.note(text, name)


def _statistics(problem: Problem, unit: Unit) -> tuple[Tensor | None, int, Tensor]:
    """(second moment of the input per token, rows in it, rows to price on); no moment of too few rows, or without a basis."""
    site, sample = problem.layout.sites[unit[0]], problem.sample(unit[0])
    assert sample is not None
    rows, width = sample.rows(), site.in_features
    needed, based = min(_shape(problem.layout, unit)), _has_basis(*_shape(problem.layout, unit))
    if isinstance(sample, Summary):
        assert sample.moment is not None
        moment = sample.moment / max(1, sample.summed) if based and sample.summed >= needed else None
        return moment, sample.summed, _spread(rows, _ROWS).to(site.weight.device)
    # few rows are needed to price on, and as many as there are for a basis
    split = len(rows) - max(len(rows) // 8, min(len(rows) // 4, _ROWS))
    priced = _spread(rows[split:], _ROWS).to(site.weight.device)
    if split < needed or not based:
        return None, split, priced
    fitted = _spread(rows[:split], max(_BASIS_ROWS, 8 * width))
    return second_moment(fitted) / len(fitted), split, priced


def _moment(rows: Tensor, like: Tensor) -> Tensor:
    """Per token."""
    wide = rows.to(like.device).float()
    return wide.t() @ wide / max(1, len(wide))


def _parts(problem: Problem, unit: Unit, found: Sensitivity, shape: Geometry) -> list[Part]:
    if len(unit) == 1:
        return []
    parts = []
    for name in unit:
        outs, columns = problem.layout.sites[name].out_features, found.columns.get(name)
        weight = problem.matrix((name,))
        given = shape.even * weight.square().sum(0) if columns is None else columns
        parts.append(Part(outs, site_norms(weight, given)))
    return parts


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` rows, evenly spaced: a reservoir holds them in the order of the text until it is full."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]
