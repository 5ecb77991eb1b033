"""Lowers what passes/fuse.py made: ``rana::masked_gemv_add`` and ``rana::normed_router``.

In: the fused operations. Out: one launch each; where no kernel applies or it is not expected to win, the parts they were
made of, for Inductor to fuse as it can.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor.lowering import lowerings, to_dtype

from rana_fx.kernels.ops import masked_gemv, router
from rana_fx.passes import lower_triton

_aten = torch.ops.aten


def masked_gemv_add(v: Any, tau: Any, weight: Any, bias: Any, scale: Any, density: float, residual: Any) -> Any:
    """The masked product plus the residual, in one launch."""
    *lead, inner = v.get_size()
    tokens = sympy.prod(lead)
    view = lowerings[_aten.view.default]
    residual_TN = view(residual, [tokens, residual.get_size()[-1]])
    y_TN = lower_triton.masked_product(view(v, [tokens, inner]), tau, weight, bias, scale, density, residual_TN)
    if y_TN is not None:
        return view(y_TN, [*lead, y_TN.get_size()[1]])
    return lowerings[_aten.add.Tensor](lowerings[masked_gemv](v, tau, weight, bias, scale, density), residual)


def normed_router(x: Any, gain: Any, weight: Any, scale: Any = None, eps: float = 0.0, offset: float = 0.0) -> Any:
    """The router's product with the norm of x in front."""
    *lead, inner = x.get_size()
    view = lowerings[_aten.view.default]
    z_TR = lower_triton.router_product(view(x, [sympy.prod(lead), inner]), weight, scale, gain, eps, offset)
    if z_TR is not None:
        return view(z_TR, [*lead, z_TR.get_size()[1]])
    mul, add = lowerings[_aten.mul.Tensor], lowerings[_aten.add.Tensor]
    wide = to_dtype(x, torch.float32)
    mean = lowerings[_aten.mean.dim](mul(wide, wide), [-1], keepdim=True)
    normed = mul(wide, lowerings[_aten.rsqrt.default](add(mean, eps)))
    if gain is not None:
        normed = mul(normed, add(to_dtype(gain, torch.float32), offset))
    return lowerings[router](to_dtype(normed, x.get_dtype()), weight, scale)
