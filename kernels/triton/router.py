"""z_TR = x_TD @ w_RD^T for a few tokens; optionally with the root-mean-square norm of x in front.

Program i_b takes BR rows and all of D, in fp32: no split, so nothing to add up afterwards. R / BR programs fill the GPU down to
BR = 1 for every router of two rows per multiprocessor or more (R >= 264).

w is floating, int8 with a scale per row, or 4 bits with a scale per row and group of columns, dequantized as in
masked_gemv_packed.py. Up to 4 tokens share every row that is read; more are taken 4 at a time, from L2.
Error: as masked_gemv.py, over D.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import triton
import triton.language as tl
from rana_fx.errors import BadOperand
from rana_fx.formats import bits_of, group_of, shape_of
from rana_fx.kernels.triton.compaction import (
    loop_bound,
    sm_count_of,
    wait_for_previous,
    zero_accumulators,
)
from rana_fx.kernels.triton.config import EAGER, H200_SM_COUNT, TOKENS_AT_ONCE, WARP_BYTES, Launch, cdiv, check_token_count
from rana_fx.kernels.triton.masked_gemv_packed import dequantize, scales_of, units, words


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """block_r: rows of a program. block_d: columns at a time; without shuffles where they are whole warps' 512 bytes. ahead: how
    many times that is read into registers before the previous kernel is waited for.
    """

    block_r: int = 8
    block_d: int = 512
    warps: int = 2
    stages: int = 4
    ahead: int = 0


def default_config(
    R: int, D: int, T: int = 1, sm_count: int = H200_SM_COUNT, *, bits: int = 16, pdl: bool = False
) -> RouterConfig:
    """Two to five programs per SM, the fastest of a sweep of 2816 x 4096 on an H200.

    16 bits: two warps that each read 512 bytes of a row and prefetch through shared memory; behind a previous kernel (pdl) four
    warps that read whole rows into registers before they wait, where those have room. 8 and 4 bits: two warps.
    """
    block_r = 8 if T == 1 else 4
    while block_r > 1 and cdiv(R, block_r) < 4 * sm_count:
        block_r //= 2
    columns = 1 << max(D - 1, 0).bit_length()
    if pdl and bits >= 16 and T == 1:
        # 64 registers a thread hold what was read ahead
        rows = max(min(block_r, 16384 // columns), 1)
        return RouterConfig(rows, max(min(1024, columns), 16), 4, 3, ahead=max(min(columns, 16384 // rows) // 1024, 1))
    return RouterConfig(block_r, max(min(2 * WARP_BYTES * 8 // bits, columns), 16))


def configs(R: int, D: int, T: int = 1, sm_count: int = H200_SM_COUNT, *, bits: int = 16) -> list[RouterConfig]:
    """At most 16 to measure."""
    base = default_config(R, D, T, sm_count, bits=bits)
    found = [
        RouterConfig(r, max(base.block_d * w // 2, 16), w, s)
        for r in (base.block_r, max(base.block_r // 2, 1))
        for w in (1, 2, 4)
        for s in (1, 4)
    ]
    return list(dict.fromkeys(found))


@triton.jit
def read_rows(
    w, scale, o_row, d, D, s_wr, s_wd, s_sk, s_sg, BD: tl.constexpr, BITS: tl.constexpr, QG: tl.constexpr, PER: tl.constexpr
):
    """Words d ... d + BD - 1 of rows o_row, and their 4-bit scales (1 in other widths)."""
    NG: tl.constexpr = BD * PER // QG
    o_d = (d + tl.arange(0, BD)).to(tl.int64)
    p_w = w + o_row.to(tl.int64)[:, None] * s_wr + o_d[None, :] * s_wd
    b_w = tl.load(p_w, mask=(o_d < D)[None, :], other=0, eviction_policy="evict_first")
    o_g = (d * PER // QG + tl.arange(0, NG)).to(tl.int64)
    return b_w, scales_of(scale, o_row, o_g, o_g * QG < D * PER, s_sk, s_sg, BITS)


@triton.jit
def add_products(
    b_sums, b_squares, b_w, b_scale, x, gain, i_t0, d, T, D, zero, s_xt, s_xd, s_gain,
    BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, QG: tl.constexpr, PER: tl.constexpr,
    NORM: tl.constexpr, HAS_GAIN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Each token's accumulators plus products with rows of ``read_rows``; with NORM of x times its gain, and sums of x^2."""
    # the eight products of one thread are added up before they meet the accumulators
    CHUNKS: tl.constexpr = BD * PER // 8
    NG: tl.constexpr = BD * PER // QG
    if BITS < 16:
        b_wide = dequantize(b_w, zero, BITS, PER)
    else:
        b_wide = tl.reshape(b_w.to(tl.float32), (BR, BD, 1))
    o_x = (d * PER + tl.arange(0, BD * PER)).to(tl.int64)
    if HAS_GAIN:
        b_gain = tl.load(gain + o_x * s_gain, mask=o_x < D * PER, other=0.0, eviction_policy="evict_last").to(tl.float32)
        b_gain = tl.reshape(b_gain + OFFSET, (1, BD, PER))
    b_more = ()
    b_more_squares = ()
    for i_t in tl.static_range(BT):
        m_x = (o_x < D * PER) & (o_x * 0 + i_t0 + i_t < T)
        p_x = x + (i_t0 + i_t).to(tl.int64) * s_xt + o_x * s_xd
        b_x = tl.reshape(tl.load(p_x, mask=m_x, other=0.0, eviction_policy="evict_last").to(tl.float32), (1, BD, PER))
        if NORM:
            b_more_squares = b_more_squares + (b_squares[i_t] + tl.sum(tl.reshape(b_x * b_x, (1, CHUNKS, 8)), 2),)
        if HAS_GAIN:
            b_x *= b_gain
        if BITS < 16:
            b_x *= units(BITS, PER)[None, None, :]
        b_part = tl.sum(tl.reshape(b_wide * b_x, (BR, CHUNKS, 8)), 2)
        if BITS == 4:
            b_part = tl.reshape(tl.reshape(b_part, (BR, NG, QG // 8)) * b_scale[:, :, None], (BR, CHUNKS))
        b_more = b_more + (b_sums[i_t] + b_part,)
    if NORM:
        b_squares = b_more_squares
    return b_more, b_squares


@triton.jit
def router_kernel(
    x, w, scale, gain, z,
    T, R, D, s_xt, s_xd, s_wr, s_wd, s_sk, s_sg, s_gain, s_zt,
    BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, MORE: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr, BITS: tl.constexpr, QG: tl.constexpr, PER: tl.constexpr, NORM: tl.constexpr, HAS_GAIN: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    # a row is D words long, of one number each or of PER packed ones; BD counts words
    i_b, i_t0 = tl.program_id(0), tl.program_id(1) * BT
    o_r = i_b * BR + tl.arange(0, BR)
    m_r = o_r < R
    # rows beyond the last are read as the last, and not written
    o_row = tl.minimum(o_r, R - 1)
    b_ahead = ()
    for i_d in tl.static_range(AHEAD):
        b_ahead = b_ahead + (read_rows(w, scale, o_row, i_d * BD, D, s_wr, s_wd, s_sk, s_sg, BD, BITS, QG, PER),)
    wait_for_previous(PDL)
    b_sums = zero_accumulators(BT, BR, BD * PER // 8)
    b_squares = zero_accumulators(BT, 1, BD * PER // 8)
    for i_d in tl.static_range(AHEAD):
        b_sums, b_squares = add_products(
            b_sums, b_squares, b_ahead[i_d][0], b_ahead[i_d][1], x, gain, i_t0, i_d * BD, T, D, R >> 31,
            s_xt, s_xd, s_gain, BT, BR, BD, BITS, QG, PER, NORM, HAS_GAIN, OFFSET,
        )  # fmt: skip
    if MORE:
        for d in tl.range(AHEAD * BD, loop_bound(D), BD, num_stages=STAGES):
            b_w, b_scale = read_rows(w, scale, o_row, d, D, s_wr, s_wd, s_sk, s_sg, BD, BITS, QG, PER)
            b_sums, b_squares = add_products(
                b_sums, b_squares, b_w, b_scale, x, gain, i_t0, d, T, D, R >> 31,
                s_xt, s_xd, s_gain, BT, BR, BD, BITS, QG, PER, NORM, HAS_GAIN, OFFSET,
            )  # fmt: skip
    for i_t in tl.static_range(BT):
        b_z = tl.sum(b_sums[i_t], 1)
        if NORM:
            # a matmul is linear: each token is divided by its norm at the end
            b_z *= tl.rsqrt(tl.sum(b_squares[i_t]) / (D * PER) + EPS)
        if BITS == 8:
            b_z *= tl.load(scale + o_row.to(tl.int64) * s_sk).to(tl.float32)
        p_z = z + (i_t0 + i_t).to(tl.int64) * s_zt + o_r
        tl.store(p_z, b_z.to(z.dtype.element_ty), mask=m_r & (o_r * 0 + i_t0 + i_t < T))


def router(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, gain: Tensor | None = None, eps: float | None = None,
    offset: float = 0.0, config: RouterConfig | None = None, how: Launch = EAGER,
) -> Tensor:  # fmt: skip
    """z, (..., R) in x's dtype.

    Args:
        x: (..., D) floating with T <= 16 rows. weight, scale: (R, D) as rana_fx.formats stores it. config: the default if None.
        eps: where given, x is normalised first, x / sqrt(mean x^2 + EPS) * (gain + offset), in fp32 and without being rounded.
        gain: (D,), with ``eps``; None for ones.
        how: with ``pdl`` the first rows are read before the previous kernel ends.

    Raises:
        BadOperand.
    """
    ranks, columns = shape_of(weight, scale)
    if x.dim() < 1 or x.shape[-1] != columns or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}"
        raise BadOperand(name="x", got=got, expected=f"floating, (..., {columns})", todo="Its last size is weight's last.")
    if gain is not None and (tuple(gain.shape) != (columns,) or eps is None):
        raise BadOperand(name="gain", got=str(tuple(gain.shape)), expected=f"({columns},)", todo="One per input, and an eps.")
    tokens = check_token_count("x", x)
    bits = bits_of(weight)
    if config is None:
        sm_count = sm_count_of(x)
        config = default_config(ranks, columns, tokens, sm_count, bits=bits, pdl=how.pdl)
    group, per_word = 0, 1
    if scale is not None:
        group = group_of(weight, scale) if bits == 4 else 0
        weight, per_word = words(weight)
    block_d = max(config.block_d, group, 8)
    groups = cdiv(tokens, TOKENS_AT_ONCE)
    rows, z = x.reshape(tokens, -1), torch.empty((tokens, ranks), dtype=x.dtype, device=x.device)
    strides = (0, 0) if scale is None else (scale.stride(0), scale.stride(1) if group else 0)
    ahead = min(config.ahead, cdiv(columns, block_d))
    kernel = how.kernel(router_kernel)
    with how.on(x):
        # arguments that a variant never reads still need a pointer
        kernel[(cdiv(ranks, config.block_r), groups)](
            rows, weight, x if scale is None else scale, x if gain is None else gain, z, tokens, ranks, weight.shape[1],
            *rows.stride(), *weight.stride(), *strides, 0 if gain is None else gain.stride(0), ranks,
            BT=cdiv(tokens, groups), BR=config.block_r, BD=block_d // per_word, AHEAD=ahead, MORE=ahead * block_d < columns,
            STAGES=config.stages, BITS=bits, QG=group or block_d, PER=per_word, NORM=eps is not None,
            HAS_GAIN=gain is not None, EPS=eps or 0.0, OFFSET=float(offset), num_warps=config.warps,
            **how.options,
        )  # fmt: skip
    return z.reshape(*x.shape[:-1], ranks)
