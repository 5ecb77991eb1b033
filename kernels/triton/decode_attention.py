"""y = softmax(q k^T * scale + mask) v for the few queries of a decoded token, in one launch that reads no masked block.

Keys are taken in blocks of BS, block i_k by split i_k % SPLITS of a KV head: in a static cache most blocks are masked, and those
that are not then spread over all programs. A program reads the mask of a block first, and its keys and values only where some
query attends to them. The queries of one KV head are the BM rows of a program, which reads k and v once for all of them.

One row is multiplied number by number, and every place of a block has its own largest score, sum of weights and sum of values,
so that a step reduces nothing but scores; several rows are multiplied on tensor cores, with weights in v's dtype as in
FlashAttention. Scores, softmax and sums are in fp32. The last program of a KV head to arrive adds the partial sums in the order
of splits (splitk.py): the same bits in every run.

    b_most, b_sum, b_y    of the keys so far: the largest score, sum of exp2(score - most) and of exp2(score - most) v; scores are
                          times log2 e. (BM, ...), or (BS, ...) of one row
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

import triton
import triton.language as tl
from rana_fx.kernels.triton.compaction import sm_count_of, wait_for_previous
from rana_fx.kernels.triton.config import COUNTERS, EAGER, H200_SM_COUNT, Launch, cdiv, power_above
from rana_fx.kernels.triton.splitk import counters_for, is_last

_MOST_ROWS = 32
_MOST_SPLITS = 16
_NO_MASK, _BOOL_MASK, _FLOAT_MASK = 0, 1, 2
_LOG2_E = math.log2(math.e)


@triton.jit
def exponent_base(b_most):
    """What is subtracted from scores: the largest, and nothing while there is no key."""
    return tl.where(b_most == float("-inf"), 0.0, b_most)


@triton.jit
def attend(b_q, b_k, b_v, b_add, b_most, b_sum, b_y, FACTOR: tl.constexpr, BM: tl.constexpr):
    """A block's keys and values added to b_most, b_sum, b_y. b_add: (1 or BM, BS), -inf where masked."""
    if BM == 1:
        b_s = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 1) * FACTOR + tl.sum(b_add, 0)
        b_next = tl.maximum(b_most, b_s)
        b_base = exponent_base(b_next)
        b_p, b_old = tl.exp2(b_s - b_base), tl.exp2(b_most - b_base)
        b_y = b_y * b_old[:, None] + b_p[:, None] * b_v.to(tl.float32)
        b_sum = b_sum * b_old + b_p
    else:
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * FACTOR + b_add
        b_next = tl.maximum(b_most, tl.max(b_s, 1))
        b_base = exponent_base(b_next)
        b_p, b_old = tl.exp2(b_s - b_base[:, None]), tl.exp2(b_most - b_base)
        b_y = b_y * b_old[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
    return b_next, b_sum, b_y


@triton.jit
def load_mask(mask, o_r, m_r, o_s, S, s_ms, MASK: tl.constexpr):
    """What is added to scores times log2 e: 0, the mask, or -inf where a key is masked or none. (rows of the mask, BS)"""
    m_there = m_r[:, None] & (o_s < S)[None, :]
    b_add = tl.where(m_there, 0.0, float("-inf"))
    if MASK != 0:
        b_mask = tl.load(mask + o_r[:, None] + o_s[None, :] * s_ms, mask=m_there, other=0)
        if MASK == 1:
            b_add = tl.where(b_mask != 0, b_add, float("-inf"))
        else:
            b_add += b_mask.to(tl.float32) * 1.4426950408889634
    return b_add


@triton.jit
def decode_attention_kernel(
    q, k, v, mask, y, part, stats, counters,
    T, S, D, E, HEADS, REPEATS,
    s_qb, s_qh, s_qt, s_qd, s_kb, s_kh, s_ks, s_vb, s_vh, s_vs, s_mb, s_mh, s_mt, s_ms, s_yb, s_yh, s_yt,
    BM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SPLITS: tl.constexpr,
    MASK: tl.constexpr, ONE_MASK: tl.constexpr, FACTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_s, i_g, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_g // HEADS).to(tl.int64), i_g % HEADS
    # row o_m: token o_m % T of the KV head's query head o_m // T
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < REPEATS * T
    o_t, o_h = (o_m % T).to(tl.int64), (i_h * REPEATS + o_m // T).to(tl.int64)
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)
    p_k, p_v = k + i_b * s_kb + i_h.to(tl.int64) * s_kh, v + i_b * s_vb + i_h.to(tl.int64) * s_vh
    # rows of the mask: one for each of the program's, or one for all
    if ONE_MASK:
        o_r = tl.zeros((1,), tl.int64) + i_b * s_mb
        m_r = o_r == o_r
    else:
        o_r = i_b * s_mb + o_h * s_mh + o_t * s_mt
        m_r = m_m
    LANES: tl.constexpr = BS if BM == 1 else BM
    b_most = tl.full((LANES,), float("-inf"), tl.float32)
    b_sum = tl.zeros((LANES,), tl.float32)
    b_y = tl.zeros((LANES, BE), tl.float32)
    wait_for_previous(PDL)
    o_s = (i_s * BS + tl.arange(0, BS)).to(tl.int64)
    b_add = load_mask(mask, o_r, m_r, o_s, S, s_ms, MASK)
    p_q = q + i_b * s_qb + o_h * s_qh + o_t * s_qt
    b_q = tl.load(p_q[:, None] + o_d[None, :] * s_qd, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    for _ in tl.range(i_s * BS, S, SPLITS * BS, num_stages=1):
        # keys that a row attends to
        m_s = tl.max((b_add != float("-inf")).to(tl.int32), 0) != 0
        o_next = o_s + SPLITS * BS
        b_next = load_mask(mask, o_r, m_r, o_next, S, s_ms, MASK)
        if tl.max(m_s.to(tl.int32), 0) != 0:
            b_k = tl.load(p_k + o_s[:, None] * s_ks + o_d[None, :], mask=m_s[:, None] & (o_d < D)[None, :], other=0.0)
            b_v = tl.load(p_v + o_s[:, None] * s_vs + o_e[None, :], mask=m_s[:, None] & (o_e < E)[None, :], other=0.0)
            b_most, b_sum, b_y = attend(b_q, b_k, b_v, b_add, b_most, b_sum, b_y, FACTOR, BM)
        o_s, b_add = o_next, b_next
    if BM == 1:
        b_old = tl.exp2(b_most - exponent_base(tl.max(b_most, 0)))
        b_y = tl.sum(b_y * b_old[:, None], 0)[None, :]
        b_sum = tl.sum(b_sum * b_old, 0) + tl.zeros((1,), tl.float32)
        b_most = tl.max(b_most, 0) + tl.zeros((1,), tl.float32)
    p_y = y + i_b * s_yb + o_h * s_yh + o_t * s_yt
    m_y = m_m[:, None] & (o_e < E)[None, :]
    if SPLITS > 1:
        i_p = i_g * tl.num_programs(2) + i_m
        o_i = tl.arange(0, BM)
        p_part = part + i_p.to(tl.int64) * (SPLITS * BM * BE) + o_i[:, None] * BE + o_e[None, :]
        p_stats = stats + i_p.to(tl.int64) * (SPLITS * BM * 2) + o_i
        tl.store(p_part + i_s * (BM * BE), b_y)
        tl.store(p_stats + i_s * (BM * 2), b_most)
        tl.store(p_stats + i_s * (BM * 2) + BM, b_sum)
        if is_last(counters, i_p, SPLITS):
            # from L2: other programs wrote them
            p_all = p_stats[None, :] + tl.arange(0, SPLITS)[:, None] * (BM * 2)
            b_mosts, b_sums = tl.load(p_all, cache_modifier=".cg"), tl.load(p_all + BM, cache_modifier=".cg")
            if BM == 1:
                # all before the first is used
                p_parts = part + i_p.to(tl.int64) * (SPLITS * BE) + tl.arange(0, SPLITS)[:, None] * BE + o_e[None, :]
                b_parts = tl.load(p_parts, cache_modifier=".cg")
            b_base = exponent_base(tl.max(b_mosts, 0))
            b_olds = tl.exp2(b_mosts - b_base[None, :])
            b_sum = tl.sum(b_sums * b_olds, 0)
            if BM == 1:
                b_y = tl.sum(b_parts * b_olds, 0)[None, :]
            else:
                b_y = tl.zeros((BM, BE), tl.float32)
                for i in tl.static_range(SPLITS):
                    b_most = tl.load(p_stats + i * (BM * 2), cache_modifier=".cg")
                    b_y += tl.load(p_part + i * (BM * BE), cache_modifier=".cg") * tl.exp2(b_most - b_base)[:, None]
            write_rows(p_y[:, None] + o_e[None, :], b_y, b_sum, m_y)
            tl.store(counters + i_p, 0)
    else:
        write_rows(p_y[:, None] + o_e[None, :], b_y, b_sum, m_y)


@triton.jit
def write_rows(p_y, b_y, b_sum, m_y):
    """Write sums of values over sums of weights: 0 for a row that attends to no key."""
    b_y = b_y / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """block_m: rows of a program. block_s: keys at a time. splits: programs that share the keys of a KV head."""

    block_m: int
    block_s: int
    splits: int
    warps: int


def default_config(rows: int, keys: int, width: int, heads: int, sm_count: int = H200_SM_COUNT) -> AttentionConfig:
    """The fastest of a few in the step of Llama-2-7B, and in launches of 8 to 512 KV heads of 128 and 256 numbers (H200).

    rows: queries of a KV head. width: numbers of a key. heads: KV heads of all sequences.
    """
    if rows == 1:
        block_m, block_s, warps, per_sm = 1, 32, 2, 4
    else:
        block_m, block_s, warps, per_sm = min(max(power_above(rows), 16), _MOST_ROWS), 64 if width <= 128 else 32, 4, 3
    programs = heads * cdiv(rows, block_m)
    wanted = min(per_sm * sm_count // programs, cdiv(keys, block_s), _MOST_SPLITS) if programs <= COUNTERS else 1
    return AttentionConfig(block_m, block_s, 1 << max(wanted, 1).bit_length() - 1, warps)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *,
    scale: float, counters: Tensor | None = None, config: AttentionConfig | None = None, how: Launch = EAGER,
) -> Tensor:  # fmt: skip
    """(B, H, T, E) in q's dtype, in memory (B, T, H, E).

    Args:
        q: (B, H, T, D), any strides. k: (B, G, S, D) and v: (B, G, S, E), H a multiple of G, D and E at most 256, the last
            dimension contiguous. mask: (B or 1, H or 1, T or 1, S), bool, or floating and added to scores.
        counters: int32 zeros, one for each KV head and 32 rows at most; the device's if None.
        config: the default one if None.
        how: with ``pdl`` nothing is read before the previous kernel ends.
    """
    batch, heads, tokens, width = q.shape
    groups, keys, out_width = k.shape[1], k.shape[2], v.shape[3]
    rows = heads // groups * tokens
    config = config or default_config(rows, keys, max(width, out_width), batch * groups, sm_count_of(q))
    splits, blocks_m, block_e = config.splits, cdiv(rows, config.block_m), max(power_above(out_width), 16)
    programs = batch * groups * blocks_m
    y = torch.empty((batch, tokens, heads, out_width), dtype=q.dtype, device=q.device)
    sums = 0 if splits == 1 else programs * splits * config.block_m
    part = torch.empty(max(sums * block_e, 1), dtype=torch.float32, device=q.device)
    stats = torch.empty(max(sums * 2, 1), dtype=torch.float32, device=q.device)
    if counters is None:
        counters = counters_for(q.device, programs)
    mask_strides = (0, 0, 0, 0) if mask is None else _strides(mask)
    kind = _NO_MASK if mask is None else _BOOL_MASK if mask.dtype == torch.bool else _FLOAT_MASK
    kernel = how.kernel(decode_attention_kernel)
    with how.on(q):
        # an argument that a variant never reads still needs a pointer
        kernel[(splits, batch * groups, blocks_m)](
            q, k, v, q if mask is None else mask, y, part, stats, counters,
            tokens, keys, width, out_width, groups, heads // groups,
            *q.stride(), *k.stride()[:3], *v.stride()[:3], *mask_strides, y.stride(0), y.stride(2), y.stride(1),
            BM=config.block_m, BS=config.block_s, BD=max(power_above(width), 16), BE=block_e, SPLITS=splits, MASK=kind,
            ONE_MASK=mask_strides[1] == 0 and (mask_strides[2] == 0 or tokens == 1), FACTOR=scale * _LOG2_E,
            num_warps=config.warps, **how.options,
        )  # fmt: skip
    return y.permute(0, 2, 1, 3)


def _strides(mask: Tensor) -> tuple[int, ...]:
    """Strides over (B, H, T, S), 0 where the mask has one for all."""
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    strides = (0,) * (4 - mask.dim()) + tuple(mask.stride())
    return tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
