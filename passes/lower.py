"""Lowers ``rana::masked_gemv``, ``rana::router`` and ``rana::masked_rows`` in Inductor.

In: the operations as AOTAutograd left them in the graph. Out: Inductor IR, one of

    a Triton kernel (GPU, few tokens, where the cost model expects it to win): lower_triton.py
    a C++ template (CPU, few tokens): reads only the rows that are kept; lower_cpp.py
    a matrix product (everything else): a mask of its input fuses into what precedes it, one of its output into what follows

A lowering and not a decomposition: decompositions handed to ``compile_fx`` become part of the FX cache's key, operators
among them cannot be pickled (torch 2.13), and the whole compile is then never cached.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering, to_dtype

from rana_fx.formats import is_plain
from rana_fx.kernels.ops import (
    masked_gemv,
    masked_gemv_add,
    masked_gemv_gated,
    masked_gemv_parts,
    masked_rows,
    normed_router,
    router,
)
from rana_fx.passes import lower_cpp, lower_fused, lower_triton

_aten = torch.ops.aten


def register() -> None:
    """Make Inductor use this lowering. Importing Inductor takes a second, so it waits for the first compile."""
    if masked_gemv not in lowerings:
        register_lowering(masked_gemv, type_promotion_kind=None)(_masked_gemv)
        register_lowering(router, type_promotion_kind=None)(_router)
        register_lowering(masked_rows, type_promotion_kind=None)(_masked_rows)
        register_lowering(masked_gemv_add, type_promotion_kind=None)(lower_fused.masked_gemv_add)
        register_lowering(masked_gemv_gated, type_promotion_kind=None)(lower_fused.masked_gemv_gated)
        register_lowering(masked_gemv_parts, type_promotion_kind=None)(lower_fused.masked_gemv_parts)
        register_lowering(normed_router, type_promotion_kind=None)(lower_fused.normed_router)


def _router(x: Any, weight: Any, scale: Any = None) -> Any:
    *lead, inner = x.get_size()
    x_TI = lowerings[_aten.view.default](x, [sympy.prod(lead), inner])
    z_TR = lower_triton.router_product(x_TI, weight, scale)
    if z_TR is None:
        z_TR = lower_cpp.router_product(x_TI, weight, scale)
    if z_TR is None and not is_plain(weight.get_dtype()):  # what eager mode would run
        return fallback_handler(router, add_to_fallback_set=False)(x, weight, scale)
    if z_TR is None:
        z_TR = lowerings[_aten.mm.default](x_TI, lowerings[_aten.permute.default](weight, [1, 0]))
    return lowerings[_aten.view.default](to_dtype(z_TR, x.get_dtype()), [*lead, z_TR.get_size()[1]])


def _masked_rows(x: Any, a: Any, weight: Any, bias: Any = None, density: float = 0.5) -> Any:
    view = lowerings[_aten.view.default]
    (*lead, inner), (*places, columns) = x.get_size(), a.get_size()
    x_TK, a_TN = view(x, [sympy.prod(lead), inner]), view(a, [sympy.prod(places), columns])
    h_TN = lower_triton.rows_product(x_TK, a_TN, weight, bias, density)
    if h_TN is None:
        h_TN = lower_cpp.rows_product(x_TK, a_TN, weight, bias, density)
    if h_TN is None:
        up_TN = lowerings[_aten.mm.default](x_TK, lowerings[_aten.permute.default](to_dtype(weight, x.get_dtype()), [1, 0]))
        if bias is not None:
            up_TN = lowerings[_aten.add.Tensor](up_TN, to_dtype(bias, x.get_dtype()))
        product = lowerings[_aten.mul.Tensor](a_TN, up_TN)
        h_TN = lowerings[_aten.where.self](lowerings[_aten.ne.Scalar](a_TN, 0), product, 0)
    return view(to_dtype(h_TN, x.get_dtype()), a.get_size())


def _masked_gemv(v: Any, tau: Any, weight: Any, bias: Any = None, scale: Any = None, density: float = 0.5) -> Any:
    *lead, inner = v.get_size()
    v_TK = lowerings[_aten.view.default](v, [sympy.prod(lead), inner])
    y_TN = lower_triton.masked_product(v_TK, tau, weight, bias, scale, density)
    if y_TN is not None:
        return lowerings[_aten.view.default](y_TN, [*lead, y_TN.get_size()[1]])
    y_TN = lower_cpp.masked_product(v_TK, tau, weight, scale)
    if y_TN is None and not is_plain(weight.get_dtype()):  # what eager mode would run
        return fallback_handler(masked_gemv, add_to_fallback_set=False)(v, tau, weight, bias, scale, density)
    if y_TN is None:
        y_TN = _dense(v_TK, tau, to_dtype(weight, v.get_dtype()))
    if bias is not None:
        y_TN = lowerings[_aten.add.Tensor](y_TN, bias)
    return lowerings[_aten.view.default](to_dtype(y_TN, v.get_dtype()), [*lead, y_TN.get_size()[1]])


def _dense(v_TK: Any, tau: Any, weight: Any) -> Any:
    wide = to_dtype(v_TK, torch.float32)
    kept = lowerings[_aten.ge.Tensor](lowerings[_aten.mul.Tensor](wide, wide), tau)
    return lowerings[_aten.mm.default](lowerings[_aten.where.self](kept, v_TK, 0), weight)
