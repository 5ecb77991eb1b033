"""The masked GEMV over rows stored in 8 bits (a scale per row) or 4 (a scale per row and group of columns).

As masked_gemv.py, with tiles of (BM rows, words, PER numbers of a word). Words are int32 where the rows allow it, so that a
thread reads 16 bytes at a time, else bytes; N counts words. In 8 bits a row's scale is already in the listed values.

At full bandwidth an H200 has about 7 instructions per 8-bit and 3.5 per 4-bit weight, and its integer conversions run at an
eighth of the rate of the rest. So a number is dequantized in place: AND and OR put it into the mantissa of 2^23, a subtraction
leaves it times a power of two, a multiply-add uses it; the power is divided out once, at the end, exactly.

Error: as masked_gemv.py against the unpacked weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rana_fx.kernels.triton.compaction import (
    column_offsets,
    constants_of,
    kept_values,
    list_ranks,
    listed_values,
    load_rows,
    loop_bound,
    ranks_of,
    summed,
    zero_accumulators,
)
from rana_fx.kernels.triton.splitk import reduce_partials, store_sums


@triton.jit
def dequantize(b_word, zero, BITS: tl.constexpr, PER: tl.constexpr):
    """(A, B) words -> (A, B, PER) fp32: the numbers stored, each times 2^shift of its position (``units`` undoes it).

    zero: an integer 0 that the compiler cannot recognise. It would otherwise move the sign flip of a word to each of its bytes,
    and make AND and OR with two constants two instructions, where one has room for a constant and a register.
    """
    # reshape keeps the layout of the load, [..., None] would move it to one of its own and the sums after it: shifts that are no
    # longer constants, and 482 instead of 325 instructions for 64 4-bit weights (Triton 3.6, sm_90)
    b_bits = tl.reshape(b_word.to(tl.int32), (b_word.shape[0], b_word.shape[1], 1))
    if BITS == 8:
        # two's complement to an offset of 128, as 4 bits are stored with one of 8
        b_bits = b_bits ^ (zero - 2139062144)
    o_q = tl.arange(0, PER)[None, None, :]
    if PER * BITS == 32:
        # the mantissa has room for 16 bits
        b_bits = tl.where(o_q >= PER // 2, b_bits >> 16, b_bits)
    o_shift = o_q % (16 // BITS) * BITS
    b_bits = (b_bits & ((o_shift * 0 + (1 << BITS) - 1) << o_shift)) | (zero + 0x4B000000)
    return b_bits.to(tl.float32, bitcast=True) - (8388608 + ((o_shift * 0 + (1 << (BITS - 1))) << o_shift)).to(tl.float32)


@triton.jit
def units(BITS: tl.constexpr, PER: tl.constexpr):
    """(PER,) fp32: 2^-shift, made from its exponent, so exactly."""
    return ((127 - tl.arange(0, PER) % (16 // BITS) * BITS) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scales_of(scale, b_k, o_g, m_g, s_sk, s_sg, BITS: tl.constexpr):
    """The 4-bit scales of rows b_k and groups o_g: (rows, groups) fp32; 1 in 8 bits."""
    b_scale = 1.0
    if BITS == 4:
        p = scale + b_k.to(tl.int64)[:, None] * s_sk + o_g[None, :] * s_sg
        b_scale = tl.load(p, mask=m_g[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
    return b_scale


@triton.jit
def add_packed_rows(
    b_sums, b_vs, b_w, b_scale, BT: tl.constexpr, BITS: tl.constexpr, RW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """As compaction.add_rows, for what ``dequantize`` returns (BM, words, PER), in 4 bits with scales (BM, chunks)."""
    b_more = ()
    for i_t in tl.static_range(BT):
        if BITS == 4:
            b_part = tl.reshape(b_w, (BM, BN // CHUNK, CHUNK)) * (b_vs[i_t][:, None] * b_scale)[:, :, None]
        else:
            b_part = b_w * b_vs[i_t][:, None, None]
        b_more = b_more + (b_sums[i_t] + summed(b_part, RW, BM, BN),)
    return b_more


@triton.jit
def masked_gemv_packed_kernel(
    v, tau, w, scale, bias, residual, part, y, lists, counters,
    T, K, N, half, s_vt, s_vk, s_tau, s_wk, s_wn, s_sk, s_sg, s_bias, s_rt, s_rn, s_ps, s_pt, s_yt,
    S: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
    BT: tl.constexpr, TG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RW: tl.constexpr, SR: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr, BITS: tl.constexpr, QG: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    LENGTH: tl.constexpr = KB + BM
    BW: tl.constexpr = BN // PER
    CHUNK: tl.constexpr = 128 // BITS if BITS == 4 else 1
    SCALED: tl.constexpr = BITS == 8
    zero = K >> 31
    i_p, i_s = tl.program_id(0), tl.program_id(1)
    i_n, i_t0 = i_p // TG, i_p % TG * BT
    v += i_t0.to(tl.int64) * s_vt
    p_list = lists + (i_s * tl.num_programs(0) + i_p).to(tl.int64) * ((1 + BT) * LENGTH)
    # half counts words, too
    o_w, m_w = column_offsets(i_n, half, N, BW, ACT)
    p_n = w + o_w * s_wn
    o_chunk, m_chunk = column_offsets(i_n, half * PER // CHUNK, tl.cdiv(N * PER, CHUNK), BN // CHUNK, ACT)
    # a scale for each thread's 16 bytes, though a group has several
    o_g = o_chunk * CHUNK // QG
    if EARLY > 0:
        o_e = tl.arange(0, EARLY)
        b_ke = tl.minimum(ranks_of(o_e, i_s, S, GROUP), K - 1)
        m_k = (o_e < KS) & (ranks_of(o_e, i_s, S, GROUP) < K)
        b_early = load_rows(p_n[None, :] + b_ke.to(tl.int64)[:, None] * s_wk, m_w, WHOLE)
        b_scale_e = scales_of(scale, b_ke, o_g, m_chunk, s_sk, s_sg, BITS)
        b_tau, b_unit = constants_of(tau, scale, b_ke, m_k, s_tau, s_sk, SCALED)
    n_active = list_ranks(
        v, tau, scale, p_list, i_s, T - i_t0, K, s_vt, s_vk, s_tau, s_sk, S, KS, KB, GROUP, EARLY, BM, BT, SCALED, PDL
    )
    b_sums = zero_accumulators(BT, RW, BN)
    if EARLY > 0:
        b_vs_e = kept_values(v, b_tau, b_unit, b_ke, m_k, T - i_t0, s_vt, s_vk, BT, SCALED)[1]
        b_sums = add_packed_rows(b_sums, b_vs_e, dequantize(b_early, zero, BITS, PER), b_scale_e, BT, BITS, RW, EARLY, BN, CHUNK)
    for j in tl.range(0, loop_bound(n_active), BM, num_stages=STAGES):
        o_p = j + tl.arange(0, BM)
        b_k = tl.load(p_list + o_p)
        b_w = load_rows(p_n[None, :] + b_k.to(tl.int64)[:, None] * s_wk, m_w, WHOLE)
        b_scale = scales_of(scale, b_k, o_g, m_chunk, s_sk, s_sg, BITS)
        b_vs = listed_values(p_list, o_p, LENGTH, BT)
        b_sums = add_packed_rows(b_sums, b_vs, dequantize(b_w, zero, BITS, PER), b_scale, BT, BITS, RW, BM, BN, CHUNK)
    o_c, m_c = column_offsets(i_n, half * PER, N * PER, BN, ACT)
    o_n, m_n = column_offsets(i_n, half * PER, (half if ACT else N) * PER, BN // 2 if ACT else BN, 0)
    for i_t in tl.static_range(BT):
        b_y = tl.reshape(tl.reshape(tl.sum(b_sums[i_t], 0), (BW, PER)) * units(BITS, PER)[None, :], (BN,))
        store_sums(
            b_y, part, y, bias, residual, i_s, i_t, i_t0, T, o_c, m_c, o_n, m_n,
            s_ps, s_pt, s_yt, s_bias, s_rt, s_rn, S, BN, HAS_BIAS, HAS_RESIDUAL, ACT,
        )  # fmt: skip
    if S > 1:
        reduce_partials(
            part, y, bias, residual, counters, i_p, i_t0, T, half * PER, o_n, m_n, s_ps, s_pt, s_yt,
            s_bias, s_rt, s_rn, S, SR, BT, HAS_BIAS, HAS_RESIDUAL, ACT,
        )  # fmt: skip


def words(weight: Tensor) -> tuple[Tensor, int]:
    """A packed weight as a tensor of the widest words its rows allow, and how many numbers a word holds."""
    bits = 4 if weight.dtype == torch.uint8 else 8
    whole = weight.shape[1] % 4 == 0 and weight.stride(1) == 1 and weight.stride(0) % 4 == 0
    if whole and weight.storage_offset() % 4 == 0:
        return weight.view(torch.int32), 32 // bits
    return weight, 8 // bits
