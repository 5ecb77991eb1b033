"""Lowers ``rana::masked_gemv`` in Inductor.

In: the operation as AOTAutograd left it in the graph. Out: Inductor IR. Here: the mask as a pointwise operation on v and a
matrix product, so that the mask fuses into what precedes it and the product is Inductor's choice of kernel.

A lowering and not a decomposition: decompositions handed to ``compile_fx`` become part of the FX cache's key, operators
among them cannot be pickled (torch 2.13), and the whole compile is then never cached.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor.lowering import lowerings, register_lowering, to_dtype

from rana_fx.kernels.ops import masked_gemv

_aten = torch.ops.aten


def _lower(v: Any, tau: Any, weight: Any, bias: Any = None) -> Any:
    *lead, inner = v.get_size()
    outer = weight.get_size()[1]
    v_TK = lowerings[_aten.view.default](v, [sympy.prod(lead), inner])
    wide = to_dtype(v_TK, torch.float32)
    kept = lowerings[_aten.ge.Tensor](lowerings[_aten.mul.Tensor](wide, wide), tau)
    masked = lowerings[_aten.where.self](kept, v_TK, 0)
    weight = to_dtype(weight, v.get_dtype())
    if bias is None:
        y_TN = lowerings[_aten.mm.default](masked, weight)
    else:
        y_TN = lowerings[_aten.addmm.default](to_dtype(bias, v.get_dtype()), masked, weight)
    return lowerings[_aten.view.default](y_TN, [*lead, outer])


def register() -> None:
    """Make Inductor use this lowering. Importing Inductor takes a second, so it waits for the first compile."""
    if masked_gemv not in lowerings:
        register_lowering(masked_gemv, type_promotion_kind=None)(_lower)
