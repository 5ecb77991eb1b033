"""Declares ``rana::masked_gemv``: schema, eager implementation, fake tensor rule and autograd.

The mask is a constant in the backward pass (the paper's rule): gradients reach v where it is kept, the kept rows of
the weight, and the bias; thresholds have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rana_fx.kernels import reference

_LIBRARY = torch.library.Library("rana", "DEF")
_LIBRARY.define("masked_gemv(Tensor v, Tensor tau, Tensor weight, Tensor? bias=None) -> Tensor")
_LIBRARY.impl("masked_gemv", reference.masked_gemv, "CompositeExplicitAutograd")


@torch.library.register_fake("rana::masked_gemv", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    shapes = f"v {tuple(v.shape)}, tau {tuple(tau.shape)}, weight {tuple(weight.shape)}: expected (..., K), (K,), (K, N)"
    torch._check(tau.dim() == 1 and weight.dim() == 2, lambda: shapes)
    torch._check(v.shape[-1] == weight.shape[0], lambda: shapes)
    return v.new_empty((*v.shape[:-1], weight.shape[1]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG001
    v, tau, weight, bias = inputs
    ctx.save_for_backward(v, tau, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    v, tau, weight = ctx.saved_tensors
    mask = reference.kept(v, tau)
    rows = grad.reshape(-1, grad.shape[-1])
    grad_v = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_v = torch.where(mask, grad @ weight.to(grad.dtype).t(), grad.new_zeros(()))
    if ctx.needs_input_grad[2]:
        masked = torch.where(mask, v, v.new_zeros(())).reshape(-1, v.shape[-1])
        grad_weight = (masked.t() @ rows).to(weight.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_v, None, grad_weight, grad_bias


torch.library.register_autograd("rana::masked_gemv", _backward, setup_context=_save, lib=_LIBRARY)

masked_gemv = torch.ops.rana.masked_gemv.default
