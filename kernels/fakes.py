"""Shapes and dtypes of results without computing them: the rule of each operation for tensors without data, as PyTorch traces.

A rule has the name and the parameters of its operation. Where shapes do not fit it raises, so while a graph is traced; BadOperand
where a weight and its scale do not belong together (formats.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rana_fx.formats import gated_unit, shape_of


def masked_gemv(
    v: Tensor,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    scale: Tensor | None = None,
    density: float = 0.5,  # noqa: ARG001
) -> Tensor:
    shapes = f"v {tuple(v.shape)}, tau {tuple(tau.shape)}, weight {tuple(weight.shape)}: expected (..., K), (K,), (K, N)"
    torch._check(tau.dim() == 1 and weight.dim() == 2, lambda: shapes)
    torch._check(v.shape[-1] == weight.shape[0], lambda: shapes)
    torch._check(tau.shape[0] == weight.shape[0], lambda: shapes)
    return v.new_empty((*v.shape[:-1], shape_of(weight, scale)[1]))


def router(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    ranks, columns = shape_of(weight, scale)
    torch._check(x.shape[-1] == columns, lambda: f"x {tuple(x.shape)}: expected (..., {columns})")
    return x.new_empty((*x.shape[:-1], ranks))


def masked_rows(
    x: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    density: float = 0.5,  # noqa: ARG001
) -> Tensor:
    shapes = f"x {tuple(x.shape)}, a {tuple(a.shape)}, weight {tuple(weight.shape)}: expected (..., K), (..., N), (N, K)"
    torch._check(weight.dim() == 2 and x.dim() >= 1 and a.dim() >= 1, lambda: shapes)
    torch._check(x.shape[-1] == weight.shape[1], lambda: shapes)
    torch._check(a.shape[-1] == weight.shape[0], lambda: shapes)
    torch._check(math.prod(x.shape[:-1]) == math.prod(a.shape[:-1]), lambda: f"{shapes}, as many rows of x as of a")
    torch._check(x.dtype == a.dtype, lambda: f"x {x.dtype}, a {a.dtype}: expected one dtype")
    return a.new_empty(a.shape)


def masked_gemv_add(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, density: float, residual: Tensor
) -> Tensor:
    y: Tensor = masked_gemv(v, tau, weight, bias, scale, density)
    torch._check(residual.shape == y.shape, lambda: f"residual {tuple(residual.shape)}: expected {tuple(y.shape)}")
    return y


def masked_gemv_gated(
    v: Tensor,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    density: float,
    activation: str,  # noqa: ARG001
) -> Tensor:
    y: Tensor = masked_gemv(v, tau, weight, bias, scale, density)
    columns, unit = y.shape[-1], gated_unit(weight, scale)
    torch._check(columns % unit == 0, lambda: f"{columns} columns: expected a multiple of {unit}")
    return y.new_empty((*y.shape[:-1], columns // 2))


def masked_gemv_normed(
    v: Tensor,
    gain: Tensor | None,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    density: float,
    activation: str | None,
    eps: float,  # noqa: ARG001
    offset: float,  # noqa: ARG001
) -> Tensor:
    torch._check(gain is None or gain.shape == tau.shape, lambda: f"gain: expected {tuple(tau.shape)}, one number per rank")
    operands = v, tau, weight, bias, scale, density
    y: Tensor = masked_gemv(*operands) if activation is None else masked_gemv_gated(*operands, activation)
    return y


def masked_gemv_parts(
    v: Tensor,
    taus: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    density: float,  # noqa: ARG001
) -> Tensor:
    count = f"{len(weights)} weights with {len(taus)} thresholds and {len(biases)} biases"
    torch._check(len(taus) == len(weights) > 0 and len(biases) in (0, len(weights)), lambda: f"{count}: expected as many of each")
    widths = [masked_gemv(v, tau, weight).shape[-1] for tau, weight in zip(taus, weights, strict=True)]
    return v.new_empty((*v.shape[:-1], sum(widths)))


def normed_router(
    x: Tensor,
    gain: Tensor | None,  # noqa: ARG001
    weight: Tensor,
    scale: Tensor | None = None,
    eps: float = 0.0,  # noqa: ARG001
    offset: float = 0.0,  # noqa: ARG001
) -> Tensor:
    z: Tensor = router(x, weight, scale)
    return z


def register(library: torch.library.Library) -> None:
    """Give every operation its rule."""
    fused = (masked_gemv_add, masked_gemv_gated, masked_gemv_normed, masked_gemv_parts, normed_router)
    for rule in (masked_gemv, router, masked_rows, *fused):
        torch.library.register_fake(f"rana::{rule.__name__}", rule, lib=library)
