"""y_TN = c_N + sum over k with v_Tk^2 >= tau_k of v_Tk * w_kN, reading only the rows of w that some token keeps.

One launch: program (i_n, i_s) lists the active ranks of its slice (compaction.py) and adds their rows, BN outputs wide and BM
rows at a time, in fp32. The S partials (S, T, N) are added by the last program to arrive (splitk.py), which also adds the bias
and the residual, and may apply act(gate) * up. No float atomics, nothing to zero, the same bits in every run.

EARLY ranks of a slice are read before v is: the memory would be idle while the list is made.

w is (K, N), rank-major: floating here, in 8 or 4 bits in masked_gemv_packed.py. Any strides; with unit stride along N rows are
read 16 bytes at a time. Up to 4 tokens share every row that is read; more are taken 4 at a time, and read what they need again,
from L2. With independent masks of 50 % four tokens need 94 % of the rows: a dense matmul is as fast there (cost.py).

Error: products and sums in fp32, relative RMSE <= 4 * eps(fp32) * sqrt(log2 K + 1) before the result is rounded to v's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rana_fx.errors import BadOperand
from rana_fx.formats import bits_of, group_of, shape_of
from rana_fx.kernels.gemv import ACTIVATION_CODES, check_operands
from rana_fx.kernels.triton.compaction import (
    add_rows,
    column_offsets,
    constants_of,
    kept_values,
    list_ranks,
    listed_values,
    load_rows,
    loop_bound,
    ranks_of,
    sm_count_of,
    zero_accumulators,
)
from rana_fx.kernels.triton.config import EAGER, GROUP, TOKENS_AT_ONCE, Config, Launch, cdiv, default_config, row_warps_of
from rana_fx.kernels.triton.masked_gemv_packed import masked_gemv_packed_kernel, words
from rana_fx.kernels.triton.splitk import counters_for, partials_at_once, reduce_partials, store_sums


@triton.jit
def masked_sums(
    i_n, i_p, i_s, i_t0, v, tau, w, scale, bias, residual, part, y, lists, counters,
    T, K, N, half, s_vt, s_vk, s_tau, s_wk, s_wn, s_sk, s_bias, s_rt, s_rn, s_ps, s_pt, s_yt,
    S: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RW: tl.constexpr, SR: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Block i_n of the columns, slice i_s, for tokens from i_t0 on. i_p: the block's index in the launch."""
    LENGTH: tl.constexpr = KB + BM
    v += i_t0.to(tl.int64) * s_vt
    p_list = lists + (i_s * tl.num_programs(0) + i_p).to(tl.int64) * ((1 + BT) * LENGTH)
    o_c, m_c = column_offsets(i_n, half, N, BN, ACT)
    p_n = w + o_c * s_wn
    if EARLY > 0:
        o_e = tl.arange(0, EARLY)
        b_k = tl.minimum(ranks_of(o_e, i_s, S, GROUP), K - 1)
        m_k = (o_e < KS) & (ranks_of(o_e, i_s, S, GROUP) < K)
        b_early = load_rows(p_n[None, :] + b_k.to(tl.int64)[:, None] * s_wk, m_c, WHOLE)
        b_tau, b_unit = constants_of(tau, scale, b_k, m_k, s_tau, s_sk, False)
    n_active = list_ranks(
        v, tau, scale, p_list, i_s, T - i_t0, K, s_vt, s_vk, s_tau, s_sk, S, KS, KB, GROUP, EARLY, BM, BT, False, PDL
    )
    b_sums = zero_accumulators(BT, RW, BN)
    if EARLY > 0:
        b_vs = kept_values(v, b_tau, b_unit, b_k, m_k, T - i_t0, s_vt, s_vk, BT, False)[1]
        b_sums = add_rows(b_sums, b_vs, b_early.to(tl.float32), BT, RW, EARLY, BN)
    for j in tl.range(0, loop_bound(n_active), BM, num_stages=STAGES):
        o_p = j + tl.arange(0, BM)
        o_k = tl.load(p_list + o_p).to(tl.int64)
        b_w = load_rows(p_n[None, :] + o_k[:, None] * s_wk, m_c, WHOLE)
        b_sums = add_rows(b_sums, listed_values(p_list, o_p, LENGTH, BT), b_w.to(tl.float32), BT, RW, BM, BN)
    o_n, m_n = column_offsets(i_n, half, half if ACT else N, BN // 2 if ACT else BN, 0)
    for i_t in tl.static_range(BT):
        store_sums(
            tl.sum(b_sums[i_t], 0), part, y, bias, residual, i_s, i_t, i_t0, T, o_c, m_c, o_n, m_n,
            s_ps, s_pt, s_yt, s_bias, s_rt, s_rn, S, BN, HAS_BIAS, HAS_RESIDUAL, ACT,
        )  # fmt: skip
    if S > 1:
        reduce_partials(
            part, y, bias, residual, counters, i_p, i_t0, T, half, o_n, m_n, s_ps, s_pt, s_yt,
            s_bias, s_rt, s_rn, S, SR, BT, HAS_BIAS, HAS_RESIDUAL, ACT,
        )  # fmt: skip


@triton.jit
def masked_gemv_kernel(
    v, tau, w, scale, bias, residual, part, y, lists, counters,
    T, K, N, half, s_vt, s_vk, s_tau, s_wk, s_wn, s_sk, s_bias, s_rt, s_rn, s_ps, s_pt, s_yt,
    S: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
    BT: tl.constexpr, TG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RW: tl.constexpr, SR: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_p, i_s = tl.program_id(0), tl.program_id(1)
    masked_sums(
        i_p // TG, i_p, i_s, i_p % TG * BT, v, tau, w, scale, bias, residual, part, y, lists, counters,
        T, K, N, half, s_vt, s_vk, s_tau, s_wk, s_wn, s_sk, s_bias, s_rt, s_rn, s_ps, s_pt, s_yt,
        S, KS, KB, GROUP, EARLY, BT, BM, BN, RW, SR, STAGES, WHOLE, ACT, HAS_BIAS, HAS_RESIDUAL, PDL,
    )  # fmt: skip


def masked_gemv(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, *,
    residual: Tensor | None = None, activation: str | None = None, config: Config | None = None,
    counters: Tensor | None = None, how: Launch = EAGER,
) -> Tensor:  # fmt: skip
    """The masked GEMV in v's dtype, in one launch.

    Args:
        v: (..., K) floating, T <= 16 rows in all. tau: (K,). weight, scale: as rana_fx.formats stores them, K rows.
        bias: (N,).
        residual: (..., N) floating, added in fp32, last; not together with an activation.
        activation: "silu", "gelu_tanh", "gelu" or "relu": the result is act(first half) * second half of the N columns, in fp32
            until it is rounded once. N is even then; in 8 and 4 bits a half is whole words and groups.
        config: the default one if None.
        counters: zeros, int32, one for each block of outputs and each 4 tokens, that no other launch uses at the same time; the
            device's next ones if None (splitk.py). A traced launch needs its own.
        how: with ``pdl`` thresholds, scales and early rows are read before the previous kernel ends.

    Returns:
        (..., N), or (..., N / 2) with an activation.

    Raises:
        BadOperand, UnknownChoice.
    """
    rows, columns = check_operands(v, tau, weight, bias, scale, residual, activation)
    if how.traced and counters is None:
        # a tensor that is made while a graph is traced does not outlive the tracing
        raise BadOperand(name="counters", got="None", expected="int32 zeros", todo="Make them before tracing.")
    act = ACTIVATION_CODES[activation] if activation else 0
    if config is None:
        sm_count = sm_count_of(v)
        config = default_config(v.shape[-1], columns, rows, sm_count=sm_count, bits=bits_of(weight))
    added = None if residual is None else residual.reshape(rows, -1)
    y = _launch(v.reshape(rows, -1), tau, weight, scale, bias, added, counters, config, act, how)
    return y.reshape(*v.shape[:-1], y.shape[1])


def _launch(
    v: Tensor, tau: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    counters: Tensor | None, config: Config, act: int, how: Launch,
) -> Tensor:  # fmt: skip
    """(T, N) or, with an activation, (T, N / 2). Operands as ``masked_gemv``, with one leading dimension."""
    (tokens, ranks), columns = v.shape, shape_of(weight, scale)[1]
    part = torch.empty((config.splits, tokens, columns), dtype=torch.float32, device=v.device)
    y = torch.empty((tokens, columns // 2 if act else columns), dtype=v.dtype, device=v.device)
    groups = cdiv(tokens, TOKENS_AT_ONCE)
    half = columns // 2 if act else 0
    bits, group, per_word = bits_of(weight), 0, 1
    kernel, block_n = masked_gemv_kernel, config.block_n
    meta: dict[str, int] = {}
    if bits < 16:
        assert scale is not None
        group = group_of(weight, scale) if bits == 4 else 0
        weight, per_word = words(weight)
        block_n = max(block_n, (2 if act else 1) * max(group, per_word))
        kernel, meta = masked_gemv_packed_kernel, dict(BITS=bits, QG=group or block_n, PER=per_word)
    apart = block_n // 2 if act else block_n
    blocks = cdiv(half or columns, apart)
    if counters is None:
        counters = counters_for(v.device, blocks * groups)
    meta |= meta_of(config, tokens, ranks, block_n, bits) | dict(
        WHOLE=(half or columns) % apart == 0, ACT=act, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        **how.options,
    )  # fmt: skip
    grid = (blocks * groups, config.splits)
    lists = lists_for(v, grid, meta)
    strides = (0, 0) if scale is None else (scale.stride(0), scale.stride(1) if group else 0)
    kernel = how.kernel(kernel)
    with how.on(v):
        # arguments that a variant never reads still need a pointer
        kernel[grid](
            v, tau, weight, v if scale is None else scale, v if bias is None else bias,
            v if residual is None else residual, part, y, lists, counters,
            tokens, ranks, weight.shape[1], half // per_word, *v.stride(),
            *tau.stride(), *weight.stride(), *strides[: 1 if bits >= 16 else 2], 0 if bias is None else bias.stride(0),
            *((0, 0) if residual is None else residual.stride()), *part.stride()[:2], y.stride(0), **meta,
        )  # fmt: skip
    return y


def meta_of(config: Config, tokens: int, ranks: int, block_n: int, bits: int) -> dict[str, int]:
    """The constants a launch is compiled for that follow from its config and sizes."""
    groups, slice_size = cdiv(tokens, TOKENS_AT_ONCE), config.slice_ranks(ranks)
    row_warps = row_warps_of(config.warps, block_n, bits)
    return dict(
        S=config.splits, KS=slice_size, KB=triton.next_power_of_2(slice_size), GROUP=GROUP,
        EARLY=config.early and max(config.early, row_warps), BT=cdiv(tokens, groups), TG=groups,
        BM=max(config.block_m, row_warps), BN=block_n, RW=row_warps, SR=partials_at_once(config.warps, block_n),
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


def lists_for(v: Tensor, grid: tuple[int, int], meta: dict[str, int]) -> Tensor:
    """Memory for the lists of a launch's programs (compaction.py)."""
    return torch.empty(grid[0] * grid[1] * (1 + meta["BT"]) * (meta["KB"] + meta["BM"]), dtype=torch.int32, device=v.device)
