"""Outputs of a linear at one of its operating points, as the adapter would compute them, before there is one."""

from __future__ import annotations

from torch import Tensor

from rana_fx.recipes.rana.candidates import UnitCandidates
from rana_fx.recipes.rana.operating_point import OperatingPoint


def outputs(candidates: UnitCandidates, point: OperatingPoint, weight_OI: Tensor, rows_TI: Tensor) -> Tensor:
    """(tokens, out), fp32, without a bias, of a unit of one site, its weight and rows of its input fp32, too."""
    if point.kind == "dense":
        return rows_TI @ weight_OI.t()
    if point.kind == "neuron":
        return (rows_TI * (rows_TI.square() >= candidates.input_thresholds(point)[0])) @ weight_OI.t()
    components = candidates.components
    assert components is not None
    router_RI, factor_RO = (matrix[: point.ranks].to(rows_TI) for matrix in (components.router_DI, components.factor_DO))
    if point.kind == "hybrid":
        rows_TI = rows_TI * (rows_TI.square() >= candidates.input_thresholds(point)[0])
    z_TR = rows_TI @ router_RI.t()
    kept_TR = (z_TR / components.units_D[: point.ranks]).square() >= components.threshold(point)
    return (z_TR * kept_TR) @ factor_RO
