"""Several masked GEMVs of one v, each with its own thresholds and weight, in one launch: y = [y_0, y_1, ...].

q, k and v under masks of their own read one tensor. As three launches, each is too small to fill the GPU. Here blocks of outputs
of all parts share a grid; a program selects the pointers of its part and continues as in masked_gemv.py.

Weights are floating, rank-major with unit stride, of one dtype; up to three.   Error: as masked_gemv.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from rana_fx.kernels.gemv import check_parts
from rana_fx.kernels.triton.compaction import sm_count_of
from rana_fx.kernels.triton.config import (
    EAGER,
    MOST_PARTS,
    TOKENS_AT_ONCE,
    Config,
    Launch,
    cdiv,
    default_config,
)
from rana_fx.kernels.triton.masked_gemv import lists_for, masked_sums, meta_of
from rana_fx.kernels.triton.splitk import counters_for


@triton.jit
def masked_parts_kernel(
    v, tau_0, tau_1, tau_2, w_0, w_1, w_2, bias_0, bias_1, bias_2, part, y, lists, counters,
    T, K, N_0, N_1, N_2, B_1, B_2, s_vt, s_vk, s_w0, s_w1, s_w2, s_ps, s_pt, s_yt,
    S: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
    BT: tl.constexpr, TG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RW: tl.constexpr, SR: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # part p has blocks B_p ... B_(p+1) - 1 of the grid
    i_p, i_s = tl.program_id(0), tl.program_id(1)
    i_n = i_p // TG
    tau, w, bias, s_wk, N, o_y = tau_0, w_0, bias_0, s_w0, N_0, i_n * 0
    if i_n >= B_2:
        tau, w, bias, s_wk, N, o_y = tau_2, w_2, bias_2, s_w2, N_2, N_0 + N_1
        i_n -= B_2
    elif i_n >= B_1:
        tau, w, bias, s_wk, N, o_y = tau_1, w_1, bias_1, s_w1, N_1, N_0
        i_n -= B_1
    masked_sums(
        i_n, i_p, i_s, i_p % TG * BT, v, tau, w, v, bias, v, part + o_y, y + o_y, lists, counters,
        T, K, N, 0, s_vt, s_vk, 1, s_wk, 1, 0, 1, 0, 0, s_ps, s_pt, s_yt,
        S, KS, KB, GROUP, EARLY, BT, BM, BN, RW, SR, STAGES, WHOLE, 0, HAS_BIAS, False, PDL,
    )  # fmt: skip


def masked_gemv_parts(
    v: Tensor, taus: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (), *,
    config: Config | None = None, counters: Tensor | None = None, how: Launch = EAGER,
) -> Tensor:  # fmt: skip
    """(..., N_0 + N_1 + ...) in v's dtype, in one launch.

    Args:
        v: (..., K) floating, T <= 16 rows in all. taus: (K,) each, contiguous. weights: (K, N_p) with unit stride along N_p, two
            or three of one floating dtype. biases: (N_p,) each, contiguous, or none at all.
        config, counters, how: as ``masked_gemv``; counters for each part's blocks.

    Raises:
        BadOperand.
    """
    tokens = check_parts(v, taus, weights, biases)
    rows, ranks = v.reshape(tokens, -1), v.shape[-1]
    sizes = [weight.shape[1] for weight in weights]
    if config is None:
        sm_count = sm_count_of(v)
        config = default_config(ranks, sum(sizes), tokens, sm_count=sm_count)
    groups, block_n = cdiv(tokens, TOKENS_AT_ONCE), config.block_n
    ends = [sum(cdiv(size, block_n) for size in sizes[: index + 1]) for index in range(len(sizes))]
    blocks = ends[-1]
    if counters is None:
        counters = counters_for(v.device, blocks * groups)
    part = torch.empty((config.splits, tokens, sum(sizes)), dtype=torch.float32, device=v.device)
    y = torch.empty((tokens, sum(sizes)), dtype=v.dtype, device=v.device)
    meta = meta_of(config, tokens, ranks, block_n, 8 * weights[0].element_size()) | dict(
        WHOLE=all(size % block_n == 0 for size in sizes), HAS_BIAS=bool(biases), **how.options
    )
    grid = (blocks * groups, config.splits)
    lists = lists_for(v, grid, meta)

    def three(values: Sequence[Any]) -> list[Any]:
        # a part beyond the last has no block
        return [*values, *[values[-1]] * (MOST_PARTS - len(values))]

    with how.on(v):
        how.kernel(masked_parts_kernel)[grid](
            rows, *three(taus), *three(weights), *three(biases or [v]), part, y, lists, counters,
            tokens, ranks, *three(sizes), *three(ends)[:2], *rows.stride(), *three([weight.stride(0) for weight in weights]),
            *part.stride()[:2], y.stride(0), **meta,
        )  # fmt: skip
    return y.reshape(*v.shape[:-1], sum(sizes))
