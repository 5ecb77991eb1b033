"""What every operation computes, in plain PyTorch: tests compare with it, and it is used where no kernel applies.

    masked_gemv(v, tau, weight, bias, scale):  y = bias + sum over k with v_k^2 >= tau_k of v_k * w[k, :]
    router(x, weight, scale):                  z = x @ w^T
    masked_rows(x, a, weight, bias):           h = a * (x @ w^T + bias) where a is not zero, 0 elsewhere
    normed_router(h, gain, weight, scale, eps, offset):  the same of x = h / sqrt(mean h^2 + eps) * (gain + offset)
    masked_gemv_add(..., residual):            masked_gemv(...) + residual
    masked_gemv_gated(..., activation):        act(first half) * second half of the N columns of masked_gemv(...)
    masked_gemv_normed(h, gain, ..., activation, eps, offset):  masked_gemv or, with an activation, masked_gemv_gated of such an x
    masked_gemv_parts(v, taus, weights, biases):  masked_gemv(v, taus[p], weights[p], biases[p]) beside each other
    NaN and infinities of v come out as in the dense model: what is dropped is a number (``kept``)
    w is what the storage format of weight and scale dequantizes (rana_fx/formats), registered from wherever it may be

Legend: T tokens (all leading dims), K ranks or inputs, N outputs, R ranks, D inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rana_fx.errors import UnknownChoice
from rana_fx.formats import unpack

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
}


def kept(v: Tensor, tau_K: Tensor) -> Tensor:
    """The mask, (..., K) bool: False where v^2 is a number below its threshold.

    So a NaN is kept, whatever the threshold, and comes out as in the dense model. Squares are taken in fp32: in fp16 they would
    overflow at 256 and vanish below 2e-4.
    """
    return ~(v.float().square() < tau_K)


def masked_gemv(v: Tensor, tau_K: Tensor, weight_KN: Tensor, bias_N: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """(..., K), (K,) fp32, (K, N), (N,) -> (..., N) in v's dtype."""
    masked = torch.where(kept(v, tau_K), v, v.new_zeros(()))
    bias = None if bias_N is None else bias_N.to(v.dtype)
    return torch.nn.functional.linear(masked, unpack(weight_KN, scale, v.dtype).t(), bias)


def router(x: Tensor, weight_RD: Tensor, scale: Tensor | None = None) -> Tensor:
    """(..., D), (R, D) -> (..., R) in x's dtype."""
    return torch.nn.functional.linear(x, unpack(weight_RD, scale, x.dtype))


def masked_rows(x: Tensor, a: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """(..., K), (..., N), (N, K), (N,) -> a's shape, in x's dtype, which is a's.

    By selection, so that a dropped output that would have been infinite does not become NaN.
    """
    bias = None if bias_N is None else bias_N.to(x.dtype)
    up = torch.nn.functional.linear(x, weight_NK.to(x.dtype), bias).reshape(a.shape)
    return torch.where(a != 0, a * up, a.new_zeros(()))


def normed_router(
    h: Tensor, gain_D: Tensor | None, weight_RD: Tensor, scale: Tensor | None = None, eps: float = 0.0, offset: float = 0.0
) -> Tensor:
    """(..., D), (D,), (R, D) -> (..., R) in h's dtype. Norm, gain and matmul in fp32 (fp64 for fp64), rounded once."""
    x = normed(h, gain_D, eps, offset)
    return torch.nn.functional.linear(x, unpack(weight_RD, scale, x.dtype)).to(h.dtype)


def masked_gemv_add(
    v: Tensor, tau_K: Tensor, weight_KN: Tensor, bias_N: Tensor | None, scale: Tensor | None, residual: Tensor
) -> Tensor:
    """As masked_gemv, plus (..., N), added before the result is rounded to v's dtype."""
    y = _unrounded(v, tau_K, weight_KN, bias_N, scale)
    return (y + residual.to(y.dtype)).to(v.dtype)


def masked_gemv_gated(
    v: Tensor, tau_K: Tensor, weight_KN: Tensor, bias_N: Tensor | None, scale: Tensor | None, activation: str
) -> Tensor:
    """As masked_gemv, then act(first half) * second half, (..., N / 2), before the result is rounded to v's dtype."""
    if activation not in ACTIVATIONS:
        raise UnknownChoice(kind="activation", got=activation, valid=", ".join(ACTIVATIONS))
    first, second = _unrounded(v, tau_K, weight_KN, bias_N, scale).chunk(2, -1)
    return (ACTIVATIONS[activation](first) * second).to(v.dtype)


def masked_gemv_normed(
    h: Tensor, gain_K: Tensor | None, tau_K: Tensor, weight_KN: Tensor, bias_N: Tensor | None, scale: Tensor | None,
    activation: str | None, eps: float, offset: float,
) -> Tensor:  # fmt: skip
    """As masked_gemv or masked_gemv_gated, of h after its norm, rounded to h's dtype."""
    operands = normed(h, gain_K, eps, offset).to(h.dtype), tau_K, weight_KN, bias_N, scale
    return masked_gemv(*operands) if activation is None else masked_gemv_gated(*operands, activation)


def masked_gemv_parts(v: Tensor, taus: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """(..., K), (K,) each, (K, N_p) each, (N_p,) each or no biases -> (..., sum of N_p) in v's dtype."""
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    return torch.cat([masked_gemv(v, *part) for part in zip(taus, weights, given, strict=True)], -1)


def normed(h: Tensor, gain: Tensor | None, eps: float, offset: float) -> Tensor:
    """h / sqrt(mean h^2 + eps) * (gain + offset) in fp32 (fp64 for fp64)."""
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if gain is None else x * (gain.to(x.dtype) + offset)


def _unrounded(v: Tensor, tau_K: Tensor, weight_KN: Tensor, bias_N: Tensor | None, scale: Tensor | None) -> Tensor:
    """masked_gemv in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(v.dtype, torch.float32)
    masked = torch.where(kept(v, tau_K), v, v.new_zeros(())).to(wide)
    return torch.nn.functional.linear(masked, unpack(weight_KN, scale, wide).t(), None if bias_N is None else bias_N.to(wide))
