"""Launches masked_gemv.cu for several weights of one v, each with its own thresholds: y = [y_0, y_1, ...], in one launch.

Weights are in the dtype of v.   Error: as masked_gemv.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rana_fx.errors import BadOperand
from rana_fx.kernels.cuda.config import Config, default_config
from rana_fx.kernels.cuda.masked_gemv import Launch, arguments_of, constants_of, joined, refusal
from rana_fx.kernels.gemv import check_parts
from rana_fx.kernels.triton.compaction import sm_count_of

_BITS = 16


def masked_gemv_parts(
    v: Tensor, taus: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *,
    config: Config | None = None, early: bool = False,
) -> Tensor:  # fmt: skip
    """(..., N_0 + N_1 + ...) in v's dtype, in one launch.

    Args:
        v: (..., K) bf16 or fp16, T <= 16 rows in all. taus: (K,) each, contiguous. weights: (K, N_p) in v's dtype, two or three,
            whose rows are aligned 16 bytes. biases: (N_p,) each, contiguous, or none at all.
        config, early: as ``masked_gemv``.

    Raises:
        BadOperand, KernelNotCompiled.
    """
    with torch.cuda.device_of(v):
        y = prepared(v, taus, weights, biases, config=config)(early=bool(early))
    return y.reshape(*v.shape[:-1], y.shape[1])


def prepared(
    v: Tensor, taus: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], *, config: Config | None
) -> Launch:
    """The launch of ``masked_gemv_parts``. Raises BadOperand."""
    tokens, sizes = check_parts(v, taus, weights, biases), [weight.shape[1] for weight in weights]
    for index, (tau, weight) in enumerate(zip(taus, weights, strict=True)):
        reason = f"reads weights in {v.dtype} only" if weight.dtype != v.dtype else refusal(v, tau, weight, None)
        if reason is not None:
            expected = f"another: it {reason}"
            raise BadOperand(
                name=f"weights[{index}]", got="not for this kernel", expected=expected, todo="Use the Triton kernel."
            )
    rows, ends = v.reshape(tokens, -1), [0, *accumulate(sizes)]
    config = config or default_config(v.shape[-1], ends[-1], tokens, bits=_BITS)
    y = torch.empty((tokens, ends[-1]), dtype=v.dtype, device=v.device)
    taus, biases = _of_one_dtype(taus), _of_one_dtype(biases)
    # memory that is shared with a file begins anywhere
    weights = [weight.clone() if weight.data_ptr() % 16 else weight for weight in weights]
    given: list[Tensor | None] = [*biases] or [None] * len(weights)
    arguments = [
        arguments_of(rows, tau, weight, None, bias, None, y[:, end - weight.shape[1] : end])
        for tau, weight, bias, end in zip(taus, weights, given, ends[1:], strict=True)
    ]
    blocks = list(accumulate(config.blocks(size, _BITS, gated=False) for size in sizes))
    alone = config.alone(blocks[-1], sm_count_of(v))
    constants = constants_of(rows, taus[0], weights[0], None, given[0], None, None, config, alone=alone, weights=len(weights))
    parameter = joined(arguments, [count // config.splits for count in blocks])
    return Launch(constants, parameter, blocks[-1], y, (rows, *taus, *weights, *biases))


def _of_one_dtype(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As they are if their dtypes are the same, else in fp32."""
    return tensors if len({tensor.dtype for tensor in tensors}) <= 1 else [tensor.float() for tensor in tensors]
