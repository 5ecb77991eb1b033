"""Lowers the ``rana::`` operations without a kernel of our own: matmuls, and of fused forms the operations they were made of.

In: the problem, and Inductor IR of an operation's arguments without ``density``, (tokens, ...). Out: IR of the result, (tokens,
columns). Inductor fuses pointwise operations around the matmul where it can. A quantized weight is left to the operation's eager
implementation, which unpacks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import fallback_handler, lowerings, pointwise_cat, process_subgraph_nodes, to_dtype
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from rana_fx.errors import UnknownChoice
from rana_fx.kernels import ops
from rana_fx.kernels.problem import Problem
from rana_fx.kernels.reference import ACTIVATIONS

_aten = torch.ops.aten


def masked_gemv(problem: Problem, v_TK: Any, tau: Any, weight: Any, bias: Any, scale: Any) -> Any:
    """A matmul of the masked input."""
    if problem.quantized:
        return fallback_handler(ops.masked_gemv, add_to_fallback_set=False)(v_TK, tau, weight, bias, scale, problem.density)
    wide = to_dtype(v_TK, torch.float32)
    # NaN is below no threshold, and stays
    dropped = lowerings[_aten.lt.Tensor](lowerings[_aten.mul.Tensor](wide, wide), tau)
    masked = lowerings[_aten.where.self](dropped, 0, v_TK)
    y_TN = lowerings[_aten.mm.default](masked, to_dtype(weight, v_TK.get_dtype()))
    return y_TN if bias is None else lowerings[_aten.add.Tensor](y_TN, bias)


def router(problem: Problem, x_TI: Any, weight: Any, scale: Any) -> Any:
    """A matmul."""
    if problem.quantized:
        return fallback_handler(ops.router, add_to_fallback_set=False)(x_TI, weight, scale)
    return lowerings[_aten.mm.default](x_TI, lowerings[_aten.permute.default](weight, [1, 0]))


def masked_rows(problem: Problem, x_TK: Any, a_TN: Any, weight: Any, bias: Any) -> Any:  # noqa: ARG001
    """A matmul, its result multiplied by a and selected where a is not zero."""
    up_TN = lowerings[_aten.mm.default](x_TK, lowerings[_aten.permute.default](to_dtype(weight, x_TK.get_dtype()), [1, 0]))
    if bias is not None:
        up_TN = lowerings[_aten.add.Tensor](up_TN, to_dtype(bias, x_TK.get_dtype()))
    product = lowerings[_aten.mul.Tensor](a_TN, up_TN)
    return lowerings[_aten.where.self](lowerings[_aten.ne.Scalar](a_TN, 0), product, 0)


def masked_gemv_add(problem: Problem, v_TK: Any, tau: Any, weight: Any, bias: Any, scale: Any, residual_TN: Any) -> Any:
    """The masked GEMV, then the sum."""
    y_TN = lowerings[ops.masked_gemv](v_TK, tau, weight, bias, scale, problem.density)
    return lowerings[_aten.add.Tensor](y_TN, residual_TN)


def masked_gemv_gated(problem: Problem, v_TK: Any, tau: Any, weight: Any, bias: Any, scale: Any, activation: str) -> Any:
    """The masked GEMV, then act(first half) * second half in fp32."""
    y_TN = lowerings[ops.masked_gemv](v_TK, tau, weight, bias, scale, problem.density)
    half, wide = y_TN.get_size()[-1] // 2, torch.promote_types(v_TK.get_dtype(), torch.float32)
    first, second = (to_dtype(lowerings[_aten.slice.Tensor](y_TN, -1, i * half, (i + 1) * half), wide) for i in (0, 1))
    return lowerings[_aten.mul.Tensor](_activated(first, activation), second)


def masked_gemv_parts(problem: Problem, v_TK: Any, taus: Sequence[Any], weights: Sequence[Any], biases: Sequence[Any]) -> Any:
    """The masked GEMVs one by one, concatenated."""
    given = biases or [None] * len(weights)
    parts = [lowerings[ops.masked_gemv](v_TK, *part, None, problem.density) for part in zip(taus, weights, given, strict=True)]
    # not the lowering of aten.cat, which looks for its inputs among the arguments of the node that is lowered (torch 2.11)
    return pointwise_cat(parts, 1)


def normed_router(problem: Problem, x_TI: Any, gain: Any, weight: Any, scale: Any, eps: float, offset: float) -> Any:  # noqa: ARG001
    """The norm in fp32, rounded, then the router."""
    return lowerings[ops.router](_normed(x_TI, gain, eps, offset), weight, scale)


def masked_gemv_normed(
    problem: Problem, v_TK: Any, gain: Any, tau: Any, weight: Any, bias: Any, scale: Any, activation: str | None,
    eps: float, offset: float,
) -> Any:  # fmt: skip
    """The norm in fp32, rounded, then the masked GEMV."""
    operands = _normed(v_TK, gain, eps, offset), tau, weight, bias, scale, problem.density
    return (
        lowerings[ops.masked_gemv](*operands) if activation is None else lowerings[ops.masked_gemv_gated](*operands, activation)
    )


def _normed(x: Any, gain: Any, eps: float, offset: float) -> Any:
    mul, add = lowerings[_aten.mul.Tensor], lowerings[_aten.add.Tensor]
    wide = to_dtype(x, torch.float32)
    mean = lowerings[_aten.mean.dim](mul(wide, wide), [-1], keepdim=True)
    normed = mul(wide, lowerings[_aten.rsqrt.default](add(mean, eps)))
    if gain is not None:
        normed = mul(normed, add(to_dtype(gain, torch.float32), offset))
    return to_dtype(normed, x.get_dtype())


def _activated(x: Any, activation: str) -> Any:
    """The activation of kernels/reference.py, as Inductor decomposes it. Raises UnknownChoice."""
    if activation not in ACTIVATIONS:
        raise UnknownChoice(kind="activation", got=activation, valid=", ".join(ACTIVATIONS))
    with V.fake_mode:
        # pointwise: recorded on one number
        example = torch.empty((), dtype=x.get_dtype(), device=x.get_device())
        recorded = make_fx(lambda b: ACTIVATIONS[activation](b), decomposition_table=select_decomp_table())(example)
    result = process_subgraph_nodes(recorded, [x])
    for node in recorded.graph.nodes:
        V.graph.env.pop(node, None)
    return result
