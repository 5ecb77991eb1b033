"""What the implementations of the masked GEMV on a GPU share: its fused forms, codes of activations, checks of operands.

Nothing here imports Triton or Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rana_fx.errors import BadOperand, UnknownChoice
from rana_fx.formats import gated_unit, shape_of
from rana_fx.kernels.reference import ACTIVATIONS
from rana_fx.kernels.triton.config import MOST_PARTS, check_token_count

# what kernels are compiled for: 1 silu, 2 tanh-GELU, 3 ReLU, 4 GELU
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS, 1)}


def forms(compute: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """``masked_gemv``, ``masked_gemv_add`` and ``masked_gemv_gated`` of a function with keywords ``residual`` and ``activation``.

    A fused form takes what it fuses last, as its operation does.
    """

    def add(*operands: Any) -> Any:
        """(..., N), the residual added."""
        return compute(*operands[:-1], residual=operands[-1])

    def gated(*operands: Any) -> Any:
        """(..., N / 2), the activation of one half times the other."""
        return compute(*operands[:-1], activation=operands[-1])

    return compute, add, gated


def check_operands(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    activation: str | None,
) -> tuple[int, int]:  # fmt: skip
    """(T, N) of a call, whose shapes and activation belong together.

    Raises:
        BadOperand, UnknownChoice.
    """
    ranks, columns = shape_of(weight, scale)
    if v.dim() < 1 or v.shape[-1] != ranks or not v.is_floating_point():
        got = f"{tuple(v.shape)} {v.dtype}"
        raise BadOperand(name="v", got=got, expected=f"(..., {ranks}), floating", todo="Its last size is weight's first.")
    if tuple(tau.shape) != (ranks,):
        raise BadOperand(name="tau", got=str(tuple(tau.shape)), expected=f"({ranks},)", todo="One threshold per rank.")
    tokens = check_token_count("v", v)
    if bias is not None and tuple(bias.shape) != (columns,):
        raise BadOperand(name="bias", got=str(tuple(bias.shape)), expected=f"({columns},)", todo="One number per output.")
    wanted = (*v.shape[:-1], columns)
    if residual is not None and (tuple(residual.shape) != wanted or activation is not None):
        todo = "One number per token and output, and no activation."
        raise BadOperand(name="residual", got=str(tuple(residual.shape)), expected=f"{wanted}", todo=todo)
    if activation is not None and activation not in ACTIVATION_CODES:
        raise UnknownChoice(kind="activation", got=activation, valid=", ".join(ACTIVATION_CODES))
    unit = gated_unit(weight, scale)
    if activation is not None and columns % unit:
        todo = "Apply the activation apart."
        raise BadOperand(name="weight", got=f"{columns} columns", expected=f"a multiple of {unit}", todo=todo)
    return tokens, columns


def check_parts(v: Tensor, taus: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> int:
    """T of a call with several weights, whose shapes and dtypes belong together. Raises BadOperand."""
    found = len(weights)
    if not 2 <= found <= MOST_PARTS or len(taus) != found or len(biases) not in (0, found):
        got, expected = f"{found} with {len(taus)} thresholds and {len(biases)} biases", f"2 to {MOST_PARTS}, and as many of each"
        raise BadOperand(name="weights", got=got, expected=expected, todo="Multiply by the others apart.")
    if v.dim() < 1 or not v.is_floating_point():
        raise BadOperand(name="v", got=f"{tuple(v.shape)} {v.dtype}", expected="floating, (..., K)", todo="Pass such a tensor.")
    ranks = v.shape[-1]
    for index, (tau, weight) in enumerate(zip(taus, weights, strict=True)):
        if weight.dim() != 2 or weight.shape[0] != ranks or weight.stride(1) != 1 or weight.dtype != weights[0].dtype:
            got = f"{tuple(weight.shape)} {weight.dtype}, strides {weight.stride()}"
            expected = f"({ranks}, N) {weights[0].dtype} with unit stride"
            raise BadOperand(name=f"weights[{index}]", got=got, expected=expected, todo="Multiply by it apart.")
        if tuple(tau.shape) != (ranks,) or not tau.is_contiguous():
            got = f"{tuple(tau.shape)}, strides {tau.stride()}"
            raise BadOperand(name=f"taus[{index}]", got=got, expected=f"({ranks},), contiguous", todo="One threshold per rank.")
        bias = biases[index] if biases else None
        if biases and (bias is None or tuple(bias.shape) != (weight.shape[1],) or not bias.is_contiguous()):
            got = "None" if bias is None else str(tuple(bias.shape))
            raise BadOperand(name=f"biases[{index}]", got=got, expected=f"({weight.shape[1]},)", todo="One number per output.")
    return check_token_count("v", v)
