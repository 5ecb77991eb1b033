"""The masked product over rows stored in 4 bits, with a scale per row and group of columns.

As masked_gemv.py, with tiles of (BM rows, NG groups, words of a group, PER nibbles of a word): a thread that reads 16 bytes meets
one scale. Words are int32 (PER = 8) where the rows allow it, else bytes (PER = 2); N counts words. At full bandwidth an H200 has
about 3.5 instructions per 4-bit weight, so a nibble is made a number where it stands: AND and OR put it into the mantissa of
2^23, a subtraction leaves (n - 8) * 16^(q % 4), a multiply-add takes it; the power of 16 is divided out once, at the end,
exactly. For one token the scale is folded into v.

Error: as masked_gemv.py against the unpacked weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rana_fx.kernels.gather import add_rows, empty_sums, finish_sums, load_values, next_ranks, open_ranks, trips


@triton.jit
def nibbles(b_word, PER: tl.constexpr):
    """(A, B, C) words -> (A, B, C, PER) fp32: n - 8 of nibble q, times 16^(q % 4)."""
    o_shift = (tl.arange(0, PER) % 4 * 4)[None, None, None, :]
    # reshape keeps the layout of the load, [..., None] would move it to one of its own and the sums after it: shifts that are no
    # longer constants, and 482 instead of 325 instructions for 64 weights (Triton 3.6, sm_90)
    b_bits = tl.reshape(b_word.to(tl.int32), (b_word.shape[0], b_word.shape[1], b_word.shape[2], 1))
    if PER == 8:
        # the mantissa has room for four nibbles
        b_bits = tl.where((tl.arange(0, PER) >= 4)[None, None, None, :], b_bits >> 16, b_bits)
    b_bits = (b_bits & ((o_shift * 0 + 15) << o_shift)) | 0x4B000000
    return b_bits.to(tl.float32, bitcast=True) - (8388608 + ((o_shift * 0 + 8) << o_shift)).to(tl.float32)


@triton.jit
def nibble_units(PER: tl.constexpr):
    """(PER,) fp32: 16^-(q % 4), made from its exponent, so exactly."""
    return ((127 - tl.arange(0, PER) % 4 * 4) << 23).to(tl.float32, bitcast=True)


@triton.jit
def masked_gemv_int4_kernel(
    v, tau, w, scale, bias, out, lists, counts,
    T, K, N, s_vt, s_vk, s_tau, s_wk, s_wn, s_sk, s_sg, s_bias, s_os, s_ot,
    S: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOURCE: tl.constexpr,
    DOT: tl.constexpr, NARROW: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
    QG: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    OPERAND: tl.constexpr = v.dtype.element_ty if NARROW else tl.float32
    NG: tl.constexpr = BN // QG
    WORDS: tl.constexpr = QG // PER
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    i_list = (i_s * tl.num_programs(0) + i_n).to(tl.int64)
    b_first, b_second, n_active = open_ranks(
        v, tau, lists, counts, i_s, i_list, T, K, s_vt, s_vk, s_tau, S, KS, KB, GROUP, BT, SOURCE
    )
    o_g = i_n.to(tl.int64) * NG + tl.arange(0, NG)
    o_word = o_g[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    m_word = o_word < N
    if BT == 1:
        b_sum = tl.zeros((BM, NG, WORDS, PER), tl.float32)
    else:
        b_sum = empty_sums(BT, BM, BN, DOT)
    for j in tl.range(0, trips(n_active), BM, num_stages=STAGES):
        o_p = j + tl.arange(0, BM)
        m_p = o_p < n_active
        b_k = next_ranks(lists, b_first, b_second, i_s, i_list, o_p, m_p, S, KB, BR, SOURCE)
        o_k = b_k.to(tl.int64)
        p_w = w + o_k[:, None, None] * s_wk + o_word[None, :, :] * s_wn
        b_w = tl.load(p_w, mask=m_p[:, None, None] & m_word[None, :, :], other=0, eviction_policy="evict_first")
        p_scale = scale + o_k[:, None] * s_sk + o_g[None, :] * s_sg
        m_scale = m_p[:, None] & (o_g * WORDS < N)[None, :]
        b_scale = tl.load(p_scale, mask=m_scale, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_v = load_values(v, tau, b_k, m_p, T, s_vt, s_vk, s_tau, BT)
        if BT == 1:
            b_sum += nibbles(b_w, PER) * (b_v[:, None] * b_scale)[:, :, None, None]
        else:
            b_wide = nibbles(b_w, PER) * nibble_units(PER)[None, None, None, :] * b_scale[:, :, None, None]
            b_sum = add_rows(b_sum, b_v, tl.reshape(b_wide, (BM, BN)), BT, DOT, OPERAND)
    if BT == 1:
        b_y = tl.reshape(tl.sum(b_sum, 0) * nibble_units(PER)[None, None, :], (1, BN))
    else:
        b_y = finish_sums(b_sum, BT, DOT)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N * PER
    if HAS_BIAS:
        b_y += tl.load(bias + o_n * s_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_t = tl.arange(0, BT)
    p_out = out + i_s.to(tl.int64) * s_os + o_t.to(tl.int64)[:, None] * s_ot + o_n[None, :]
    tl.store(p_out, b_y.to(out.dtype.element_ty), mask=(o_t < T)[:, None] & m_n[None, :])


def words(weight: Tensor) -> tuple[Tensor, int]:
    """The packed weight by the widest words its rows allow, and the nibbles in one."""
    whole = weight.shape[1] % 4 == 0 and weight.stride(1) == 1 and weight.stride(0) % 4 == 0
    if whole and weight.storage_offset() % 4 == 0:
        return weight.view(torch.int32), 8
    return weight, 2
