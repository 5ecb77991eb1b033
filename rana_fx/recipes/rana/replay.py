"""What a point of a menu makes of rows: the linear's outputs as the adapter would compute them, before there is one."""

from __future__ import annotations

from torch import Tensor

from rana_fx.recipes.rana.candidates import Menu
from rana_fx.recipes.rana.operating_point import Point


def outputs(menu: Menu, point: Point, weight_OI: Tensor, rows_TI: Tensor) -> Tensor:
    """(tokens, out), fp32, without a bias, of a unit of one site, its weight and rows of its input fp32, too."""
    if point.kind == "dense":
        return rows_TI @ weight_OI.t()
    if point.kind == "neuron":
        return (rows_TI * (rows_TI.square() >= menu.bars(point)[0])) @ weight_OI.t()
    assert menu.router_DI is not None and menu.factor_DO is not None
    router_RI, factor_RO = (matrix[: point.ranks].to(rows_TI) for matrix in (menu.router_DI, menu.factor_DO))
    if point.kind == "hybrid":
        rows_TI = rows_TI * (rows_TI.square() >= menu.bars(point)[0])
    z_TR = rows_TI @ router_RI.t()
    kept_TR = (z_TR / menu.units_D[: point.ranks]).square() >= menu.bar(point)
    return (z_TR * kept_TR) @ factor_RO
