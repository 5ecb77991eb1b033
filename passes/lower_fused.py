"""Lowers what passes/fuse_*.py made: ``rana::masked_gemv_add``, ``_gated`` and ``_parts``, and ``rana::normed_router``.

In: the fused operations. Out: one launch each; where no kernel applies or it is not expected to win, the parts they were
made of, for Inductor to fuse as it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._inductor.lowering import lowerings, to_dtype

from rana_fx.errors import UnknownChoice
from rana_fx.kernels.ops import masked_gemv, router
from rana_fx.kernels.reference import ACTIVATIONS
from rana_fx.passes import lower_triton

_aten = torch.ops.aten


def masked_gemv_add(v: Any, tau: Any, weight: Any, bias: Any, scale: Any, density: float, residual: Any) -> Any:
    """The masked product plus the residual, in one launch."""
    *lead, inner = v.get_size()
    tokens = sympy.prod(lead)
    view = lowerings[_aten.view.default]
    residual_TN = view(residual, [tokens, residual.get_size()[-1]])
    y_TN = lower_triton.masked_product(view(v, [tokens, inner]), tau, weight, bias, scale, density, residual_TN=residual_TN)
    if y_TN is not None:
        return view(y_TN, [*lead, y_TN.get_size()[1]])
    return lowerings[_aten.add.Tensor](lowerings[masked_gemv](v, tau, weight, bias, scale, density), residual)


def masked_gemv_gated(v: Any, tau: Any, weight: Any, bias: Any, scale: Any, density: float, activation: str) -> Any:
    """The masked product and act(first half) * second half of its columns, in one launch."""
    *lead, inner = v.get_size()
    view = lowerings[_aten.view.default]
    y_TN = lower_triton.masked_product(
        view(v, [sympy.prod(lead), inner]), tau, weight, bias, scale, density, activation=activation
    )
    if y_TN is not None:
        return view(y_TN, [*lead, y_TN.get_size()[1]])
    y = lowerings[masked_gemv](v, tau, weight, bias, scale, density)
    half, wide = y.get_size()[-1] // 2, torch.promote_types(v.get_dtype(), torch.float32)
    first, second = (to_dtype(lowerings[_aten.slice.Tensor](y, -1, i * half, (i + 1) * half), wide) for i in (0, 1))
    return to_dtype(lowerings[_aten.mul.Tensor](_activated(first, activation), second), v.get_dtype())


def masked_gemv_parts(v: Any, taus: Sequence[Any], weights: Sequence[Any], biases: Sequence[Any], density: float) -> Any:
    """Several masked products of v beside each other, in one launch."""
    *lead, inner = v.get_size()
    view = lowerings[_aten.view.default]
    y_TN = lower_triton.masked_parts(view(v, [sympy.prod(lead), inner]), taus, weights, biases, density)
    if y_TN is not None:
        return view(y_TN, [*lead, y_TN.get_size()[1]])
    given = biases or [None] * len(weights)
    parts = [lowerings[masked_gemv](v, *part, None, density) for part in zip(taus, weights, given, strict=True)]
    return lowerings[_aten.cat.default](parts, len(lead))


def _activated(x: Any, activation: str) -> Any:
    """As the kernel does it (kernels/triton/splitk.py)."""
    mul, add, sigmoid = (lowerings[op] for op in (_aten.mul.Tensor, _aten.add.Tensor, _aten.sigmoid.default))
    if activation == "silu":
        return mul(x, sigmoid(x))
    if activation == "gelu_tanh":
        return mul(x, sigmoid(mul(1.5957691216057308, add(x, mul(0.044715, mul(x, mul(x, x)))))))
    if activation == "gelu":
        return mul(mul(0.5, x), add(lowerings[_aten.erf.default](mul(0.7071067811865476, x)), 1))
    if activation == "relu":
        return lowerings[_aten.relu.default](x)
    raise UnknownChoice(kind="activation", got=activation, valid=", ".join(ACTIVATIONS))


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
