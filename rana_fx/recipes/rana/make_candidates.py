"""Menus of all units of a model, and the cuts through its MLPs.

In: a problem with its samples, units and what errors of their outputs do to the loss. Out: a ``Menu`` per unit, priced on rows of
its input, with its basis where it has one, and on the menus of blocks that may be cut their shares of it. A basis is made from
other rows than those it is priced on: principal directions of some text fit other text less well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rana_fx.calibration.layout import Layout
from rana_fx.calibration.samples import Summary
from rana_fx.calibration.sensitivity import Sensitivity
from rana_fx.recipes.basis import second_moment
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.candidates import Menu, Part
from rana_fx.recipes.rana.eligible_mlps import Cuttable
from rana_fx.recipes.rana.loss_metric import Geometry, geometry, loss_basis, site_norms
from rana_fx.recipes.rana.mlp_candidate import Cut, Share
from rana_fx.recipes.rana.mlp_exact import ExactCut
from rana_fx.recipes.rana.mlp_gated import GatedCut
from rana_fx.recipes.rana.operating_point import Unit
from rana_fx.recipes.rana.quantization import Storage, in_fewer_bits, own

if TYPE_CHECKING:
    from rana_fx.recipes.rana.recipe import Rana

ROWS = 2048  # a menu is priced on so many
_BASIS_ROWS = 8192  # rows, or eight for every input, a basis is made from
_FEW_DIRECTIONS = 32  # an input that lies in fewer is worth a remark
_CUTS: dict[str, type[Cut]] = {"gated": GatedCut, "exact": ExactCut}


def shape_of_unit(layout: Layout, unit: Unit) -> tuple[int, int]:
    """(outputs, inputs)."""
    return sum(layout.sites[name].out_features for name in unit), layout.sites[unit[0]].in_features


def has_basis(out: int, width: int) -> bool:
    """A router as tall as the layer is wide saves nothing."""
    return out > width // 2


def average(problem: Problem, found: Sensitivity) -> float | None:
    """What a unit of error of an output costs in the middle one of the units where that is known."""
    known = sorted(_even(problem.matrix(unit), moment) for unit, moment in found.moments.items()) if found.missing else []
    return known[len(known) // 2] if known else None


def _even(weight: Tensor, moment: Tensor) -> float:
    out, width = weight.shape
    return float(moment.diagonal().sum()) / (float(weight.square().sum()) if out > width else out)


def menus_of(recipe: Rana, problem: Problem, units: list[Unit], found: Sensitivity, even: float | None) -> dict[Unit, Menu]:
    """Samples kept on the host, those of a large model, are given back as they have served."""
    last = {problem.sample(unit[0]): unit for unit in units}
    cuts = recipe.cuttable(problem, units)
    leads, sources = {cut.lead: cut for cut in cuts}, {cut.source: cut for cut in cuts}
    menus: dict[Unit, Menu] = {}
    gates: dict[Unit, Menu] = {}
    shapes: dict[Unit, Geometry] = {}
    for unit in tqdm(units, desc="decompose", unit="group", disable=not problem.progress):
        menus[unit], shape = _menu(recipe, problem, unit, found, even)
        if unit in sources:
            gates[unit] = _gate_menu(recipe, problem, sources[unit], menus[unit], found, even)
        if unit in leads:
            shapes[unit] = shape
        for cut in [cut for cut in cuts if unit in cut.units and all(other in menus for other in cut.units)]:
            gate, of_down = gates.pop(cut.source), shapes.pop(cut.lead)
            if cut.kind == "exact" and not gate.offers(ExactCut.kinds):
                continue
            made = _CUTS[cut.kind](problem, cut, gate, menus[cut.source].rows_TI, of_down)
            for other in cut.units:
                menus[other].cut = Share(made, other)
            sample = problem.sample(cut.gate)
            if sample is not None and sample.host and made.gate is not menus[cut.source]:
                made.gate.park()
        del shape
        sample = problem.sample(unit[0])
        if sample is not None and sample.host and last[sample] == unit:
            sample.forget()
    return menus


def _gate_menu(recipe: Rana, problem: Problem, cut: Cuttable, source: Menu, found: Sensitivity, even: float | None) -> Menu:
    """Of a cut's gate alone, in the model's own numbers. ``source``: of the unit that holds it."""
    gate = (cut.gate,)
    if cut.kind == "exact" or (recipe.gates and cut.source == gate):
        return source
    weight, site = problem.matrix(gate), problem.layout.sites[cut.gate]
    shape, basis = geometry(weight, found.moments.pop(gate, None), even=even), None
    if recipe.gates and has_basis(*weight.shape):
        moment_II, _, _ = _statistics(problem, gate)
        basis = None if moment_II is None else loss_basis(shape, moment_II)
    storage = _of_kinds(own(_one(problem, cut.gate)), recipe.kinds if recipe.gates else ("dense",))
    return Menu(shape, basis, source.rows_TI, [storage], dtype=site.weight.dtype)


def _menu(recipe: Rana, problem: Problem, unit: Unit, found: Sensitivity, even: float | None) -> tuple[Menu, Geometry]:
    """Its basis is from other rows than those it is priced on: principal directions of some text fit other text less well."""
    weight = problem.matrix(unit)
    out, width = weight.shape
    moment_II, count, rows = _statistics(problem, unit)
    shape = geometry(weight, found.moments.pop(unit, None), even=even)
    site = problem.layout.sites[unit[0]]
    one = _one(problem, unit[0])
    basis = None
    if has_basis(out, width):
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
    storages = [_of_kinds(storage, recipe.kinds) for storage in storages]
    return Menu(shape, basis, rows, storages, _parts(problem, unit, found, shape), dtype=site.weight.dtype), shape


def _one(problem: Problem, name: str) -> float:
    """What a number of a site's weight costs a token."""
    site = problem.layout.sites[name]
    return float(site.uses * (1 if problem.metric == "flops" else site.weight.element_size()))


def _of_kinds(storage: Storage, kinds: Sequence[str]) -> Storage:
    return replace(storage, kinds=tuple(kind for kind in storage.kinds if kind in kinds))


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
    needed, based = min(shape_of_unit(problem.layout, unit)), has_basis(*shape_of_unit(problem.layout, unit))
    if isinstance(sample, Summary):
        assert sample.moment is not None
        moment = sample.moment / max(1, sample.summed) if based and sample.summed >= needed else None
        return moment, sample.summed, _spread(rows, ROWS).to(site.weight.device)
    # few rows are needed to price on, and as many as there are for a basis
    split = len(rows) - max(len(rows) // 8, min(len(rows) // 4, ROWS))
    priced = _spread(rows[split:], ROWS).to(site.weight.device)
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
