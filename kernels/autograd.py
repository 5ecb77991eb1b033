"""Gradients of ``rana::masked_gemv``, ``router`` and ``masked_rows``.

The mask is a constant in the backward pass, as in the paper: gradients reach v where it is kept, the kept rows of a floating
weight, and the bias; thresholds and quantized weights have none. The fused forms are made past autograd and have no backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rana_fx.formats import unpack
from rana_fx.kernels import reference


def _save_masked_gemv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    v, tau, weight, bias, scale, _ = inputs
    ctx.save_for_backward(v, tau, weight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_masked_gemv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    v, tau, weight, scale = ctx.saved_tensors
    mask = reference.kept(v, tau)
    rows = grad.reshape(-1, grad.shape[-1])
    grad_v = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_v = torch.where(mask, grad @ unpack(weight, scale, grad.dtype).t(), grad.new_zeros(()))
    if ctx.needs_input_grad[2]:
        masked = torch.where(mask, v, v.new_zeros(())).reshape(-1, v.shape[-1])
        grad_weight = (masked.t() @ rows).to(weight.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_v, None, grad_weight, grad_bias, None, None


def _save_router(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward_router(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    grad_x = grad @ unpack(weight, scale, grad.dtype) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = (grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
    return grad_x, grad_weight, None


def _save_masked_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:4])


def _backward_masked_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, a, weight, bias = ctx.saved_tensors
    zero = grad.new_zeros(())
    grad_x = grad_a = grad_weight = grad_bias = None
    rows = torch.where(a != 0, grad * a, zero).reshape(-1, a.shape[-1])
    if ctx.needs_input_grad[0]:
        grad_x = (rows @ weight.to(grad.dtype)).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        # made again: as much memory as the hidden rows of an MLP would otherwise wait for this
        up = reference.router(x, weight) if bias is None else reference.router(x, weight) + bias.to(x.dtype)
        grad_a = torch.where(a != 0, grad * up.reshape(a.shape), zero)
    if ctx.needs_input_grad[2]:
        grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0).to(bias.dtype)
    return grad_x, grad_a, grad_weight, grad_bias, None


def register(library: torch.library.Library) -> None:
    """Give the three operations their backward."""
    for name, backward, save in (
        ("masked_gemv", _backward_masked_gemv, _save_masked_gemv),
        ("router", _backward_router, _save_router),
        ("masked_rows", _backward_masked_rows, _save_masked_rows),
    ):
        torch.library.register_autograd(f"rana::{name}", backward, setup_context=save, lib=library)
