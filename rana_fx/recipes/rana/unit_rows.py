"""Rows of a unit's input for its candidates, and other rows for its basis.

In: a problem's sample. Out: ``UnitRows``: the second moment that a basis is made from, and the rows that candidates are
measured on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.calibration.samples import Summary
from rana_fx.recipes.basis import second_moment
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.units import Unit, has_basis, shape_of_unit

ROWS = 2048  # rows that candidates are measured on
BASIS_ROWS = 8192  # rows, or eight for every input, that a basis is made from


@dataclass(frozen=True, eq=False)
class UnitRows:
    """``moment_II``: second moment per token; None: of too few rows, or the unit has no basis. ``summed``: rows that it may be
    of.

    ``measured_TI``: rows that candidates are measured on, in the model's dtype and on its device.
    """

    moment_II: Tensor | None
    summed: int
    measured_TI: Tensor


def rows_of(problem: Problem, unit: Unit) -> UnitRows:
    """Of the unit's sample, which has at least one row."""
    site, sample = problem.layout.sites[unit[0]], problem.sample(unit[0])
    assert sample is not None
    rows, width = sample.rows(), site.in_features
    shape = shape_of_unit(problem.layout, unit)
    needed, based = min(shape), has_basis(*shape)
    if isinstance(sample, Summary):
        assert sample.moment is not None
        moment = sample.moment / max(1, sample.summed) if based and sample.summed >= needed else None
        return UnitRows(moment, sample.summed, evenly_spaced(rows, ROWS).to(site.weight.device))
    # candidates need few rows, a basis as many as there are
    split = len(rows) - max(len(rows) // 8, min(len(rows) // 4, ROWS))
    measured = evenly_spaced(rows[split:], ROWS).to(site.weight.device)
    if split < needed or not based:
        return UnitRows(None, split, measured)
    fitted = evenly_spaced(rows[:split], max(BASIS_ROWS, 8 * width))
    return UnitRows(second_moment(fitted) / len(fitted), split, measured)


def moment_of(rows: Tensor, like: Tensor) -> Tensor:
    """Second moment per token, (in, in), fp32, on the device of ``like``."""
    x_TI = rows.to(like.device).float()
    return x_TI.t() @ x_TI / max(1, len(x_TI))


def directions(rows_TI: Tensor, limit: int) -> int:
    """Number of directions that rows span, at most ``limit``; of 4 ``limit`` rows, projected on ``limit`` random directions."""
    some = torch.nn.functional.normalize(evenly_spaced(rows_TI, 4 * limit).float(), dim=1)
    generator = torch.Generator().manual_seed(0)
    views_IK = torch.randn(some.shape[1], limit, generator=generator, device="cpu").to(some.device)
    sizes = torch.linalg.svdvals(some @ views_IK)
    return int((sizes > max(1e-4, 4 * torch.finfo(rows_TI.dtype).eps) * sizes[0]).sum())


def evenly_spaced(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` rows: a reservoir holds them in the order of the text until it is full."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]
