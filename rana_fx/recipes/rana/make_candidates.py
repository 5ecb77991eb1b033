"""Candidates of all units of a model, and joint candidates of its MLPs, as the decisions that the allocation takes.

In: a problem with its samples, units and the second moments of gradients at their outputs. Out: ``Decision``s. Candidates are
measured on other rows than those that their basis is made from: principal directions of some text fit other text less well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rana_fx.calibration.sensitivity import Sensitivity
from rana_fx.recipes.basis import Basis
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.candidates import UnitCandidates, UnitSite
from rana_fx.recipes.rana.decision import Decision
from rana_fx.recipes.rana.eligible_mlps import EligibleMlp, eligible_mlps
from rana_fx.recipes.rana.loss_metric import LossMetric, loss_basis, loss_metric, shrunk, site_norms
from rana_fx.recipes.rana.mlp_candidate import MlpCandidate
from rana_fx.recipes.rana.mlp_exact import ExactMlp
from rana_fx.recipes.rana.mlp_gated import GatedMlp
from rana_fx.recipes.rana.options import Options
from rana_fx.recipes.rana.paired_errors import PairedErrors
from rana_fx.recipes.rana.quantization import UnitFormat, quantized_formats, unquantized
from rana_fx.recipes.rana.unit_rows import BASIS_ROWS, UnitRows, directions, evenly_spaced, moment_of, rows_of
from rana_fx.recipes.rana.units import Unit, has_basis
from rana_fx.skips import TOO_FEW

_FEW_DIRECTIONS = 32  # an input that spans fewer is noted
_JOINT: dict[str, type[MlpCandidate]] = {"gated": GatedMlp, "exact": ExactMlp}


def typical_scale(problem: Problem, found: Sensitivity) -> float | None:
    """The median isotropic scale of units with known moments, for units without; None: no moment is missing."""
    scales = [_scale(problem.matrix(unit), moment) for unit, moment in found.moments.items()] if found.missing else []
    return sorted(scales)[len(scales) // 2] if scales else None


def _scale(weight: Tensor, moment: Tensor) -> float:
    out, width = weight.shape
    return float(moment.diagonal().sum()) / (float(weight.square().sum()) if out > width else out)


def make_decisions(options: Options, problem: Problem, units: list[Unit], found: Sensitivity) -> list[Decision]:
    """Candidates of every unit, joint ones where a block is eligible.

    Moments are removed from ``found`` as units take them, and samples that a large model keeps on the host are released.
    """
    return _Maker(options, problem, found, typical_scale(problem, found)).decisions(units)


@dataclass(eq=False)
class _Maker:
    """Makes candidates unit by unit, and a joint candidate as soon as all units of its block are there."""

    options: Options
    problem: Problem
    found: Sensitivity
    isotropic_scale: float | None
    candidates: dict[Unit, UnitCandidates] = field(default_factory=dict)
    gates: dict[EligibleMlp, UnitCandidates] = field(default_factory=dict)
    down_metrics: dict[EligibleMlp, LossMetric] = field(default_factory=dict)

    def decisions(self, units: list[Unit]) -> list[Decision]:
        last = {self.problem.sample(unit[0]): unit for unit in units}
        mlps = eligible_mlps(self.problem.layout, units, self.options.kinds)
        joint: dict[EligibleMlp, MlpCandidate] = {}
        for unit in self.problem.steps.each(units):
            self._add(unit, [mlp for mlp in mlps if unit in mlp.units])
            for mlp in [mlp for mlp in mlps if unit in mlp.units and all(other in self.candidates for other in mlp.units)]:
                made = self._joint(mlp)
                if made is not None:
                    joint[mlp] = made
            sample = self.problem.sample(unit[0])
            if sample is not None and sample.host and last[sample] == unit:
                sample.release()
        together = {unit: mlp.units for mlp in joint for unit in mlp.units}
        groups = dict.fromkeys(together.get(unit, (unit,)) for unit in units)
        joint_of = {mlp.units: made for mlp, made in joint.items()}
        return [Decision({unit: self.candidates[unit] for unit in group}, joint_of.get(group)) for group in groups]

    def _add(self, unit: Unit, mlps: Sequence[EligibleMlp]) -> None:
        """Candidates of a unit, and what the joint candidates of its blocks need of it."""
        self.candidates[unit], metric = self._unit(unit)
        for mlp in mlps:
            if unit == mlp.gate_unit:
                self.gates[mlp] = self._gate(mlp)
            if unit == mlp.down_unit:
                self.down_metrics[mlp] = metric

    def _joint(self, mlp: EligibleMlp) -> MlpCandidate | None:
        gate, metric, kind = self.gates.pop(mlp), self.down_metrics.pop(mlp), _JOINT[mlp.kind]
        if kind.gate_kinds is not None and not gate.has(kind.gate_kinds):
            return None
        unit = self.candidates[mlp.gate_unit]
        made = kind(self.problem, mlp, gate, unit.rows_TI, metric)
        sample = self.problem.sample(mlp.gate)
        if sample is not None and sample.host and gate is not unit:
            gate.offload_to_host()
        return made

    def _gate(self, mlp: EligibleMlp) -> UnitCandidates:
        """Candidates of a block's gate alone, unquantized."""
        gate, unit = (mlp.gate,), self.candidates[mlp.gate_unit]
        if mlp.kind == "exact" or (self.options.gates and mlp.gate_unit == gate):
            return unit
        weight, site = self.problem.matrix(gate), self.problem.layout.sites[mlp.gate]
        metric, basis = loss_metric(weight, self.found.moments.pop(gate, None), isotropic_scale=self.isotropic_scale), None
        if self.options.gates and has_basis(*weight.shape):
            moment_II = rows_of(self.problem, gate).moment_II
            basis = None if moment_II is None else loss_basis(metric, moment_II)
        kinds = self.options.kinds if self.options.gates else ("dense",)
        stored = _of_kinds(unquantized(_rate(self.problem, mlp.gate)), kinds)
        return UnitCandidates(metric, basis, unit.rows_TI, [stored], dtype=site.weight.dtype)

    def _unit(self, unit: Unit) -> tuple[UnitCandidates, LossMetric]:
        """A unit's candidates, and its loss metric."""
        problem, rows = self.problem, rows_of(self.problem, unit)
        metric = loss_metric(problem.matrix(unit), self.found.moments.pop(unit, None), isotropic_scale=self.isotropic_scale)
        if all(name in self.found.outputs for name in unit):
            metric = replace(metric, outputs_O=shrunk(torch.cat([self.found.outputs[name] for name in unit])))
        basis = _basis(problem, unit, metric, rows)
        formats = [unquantized(_rate(problem, unit[0]))]
        if problem.metric == "bytes":
            formats += self._quantized(unit, metric, basis, rows)
        formats = [_of_kinds(stored, self.options.kinds) for stored in formats]
        sites, dtype = _sites(problem, unit, self.found, metric), problem.layout.sites[unit[0]].weight.dtype
        pairs = self.found.pairs.get(unit[0]) if len(unit) == 1 else None
        paired = None if basis is None or pairs is None else PairedErrors(basis, *pairs)
        return UnitCandidates(metric, basis, rows.measured_TI, formats, sites, dtype=dtype, paired=paired), metric

    def _quantized(self, unit: Unit, metric: LossMetric, basis: Basis | None, rows: UnitRows) -> list[UnitFormat]:
        problem, site, moment_II = self.problem, self.problem.layout.sites[unit[0]], rows.moment_II
        if moment_II is None:
            sampled = evenly_spaced(problem.rows(unit[0]), max(BASIS_ROWS, 4 * site.in_features))
            moment_II = moment_of(sampled, rows.measured_TI)
        return quantized_formats(
            metric,
            basis,
            {name: problem.matrix((name,)) for name in unit},
            moment_II,
            rate=_rate(problem, unit[0]),
            uses=site.uses,
            bits=self.options.bits,
            error_feedback=self.options.error_feedback,
        )


def _basis(problem: Problem, unit: Unit, metric: LossMetric, rows: UnitRows) -> Basis | None:
    """The unit's basis; None, noted where the sample is the reason, where there is none."""
    out, width = metric.left_OD.shape[0], metric.right_DI.shape[1]
    if not has_basis(out, width):
        return None
    if rows.moment_II is None:
        _note(problem, unit, f"{rows.summed} calibration tokens are {TOO_FEW} its {min(out, width)} ranks")
        return None
    spanned = directions(rows.measured_TI, 2 * _FEW_DIRECTIONS)
    if spanned < min(_FEW_DIRECTIONS, min(out, width) // 2):
        _note(problem, unit, f"its input spans {spanned} of {width} directions in the calibration text")
    return loss_basis(metric, rows.moment_II)


def _rate(problem: Problem, name: str) -> float:
    """Cost per token of one number of a site's weight."""
    site = problem.layout.sites[name]
    return float(site.uses * (1 if problem.metric == "flops" else site.weight.element_size()))


def _of_kinds(stored: UnitFormat, kinds: Sequence[str]) -> UnitFormat:
    return replace(stored, kinds=tuple(kind for kind in stored.kinds if kind in kinds))


def _note(problem: Problem, unit: Unit, text: str) -> None:
    for name in unit:
        problem.note(text, name)


def _sites(problem: Problem, unit: Unit, found: Sensitivity, metric: LossMetric) -> list[UnitSite]:
    if len(unit) == 1:
        return []
    sites = []
    for name in unit:
        outs, columns = problem.layout.sites[name].out_features, found.columns.get(name)
        weight = problem.matrix((name,))
        given = metric.isotropic_scale * weight.square().sum(0) if columns is None else columns
        sites.append(UnitSite(outs, site_norms(weight, given)))
    return sites
