"""The masked product over rows stored in 4 bits: columns 2j and 2j + 1 in one byte, a scale per row and group of columns.

As masked_gemv.py, with tiles of (BM rows, NG groups, QG / 2 bytes), so that a thread meets one scale per 16 bytes. Even and odd
columns have sums of their own, stored two apart at the end. N counts bytes here, or 2 N < limit would hide from the compiler that
16 bytes at a time are safe. For one token the scale is folded into v.

Error: as masked_gemv.py against the unpacked weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rana_fx.kernels.gather import add_rows, empty_sums, finish_sums, load_values, next_ranks, nibble, open_ranks, trips


@triton.jit
def masked_gemv_int4_kernel(
    v, tau, w, scale, bias, out, lists, counts,
    T, K, N, s_vt, s_vk, s_tau, s_wk, s_wn, s_sk, s_sg, s_bias, s_os, s_ot,
    S: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOURCE: tl.constexpr,
    DOT: tl.constexpr, OPERAND: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr, QG: tl.constexpr,
):  # fmt: skip
    NG: tl.constexpr = BN // QG
    HALF: tl.constexpr = QG // 2
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    i_list = (i_s * tl.num_programs(0) + i_n).to(tl.int64)
    b_first, b_second, n_active = open_ranks(
        v, tau, lists, counts, i_s, i_list, T, K, s_vt, s_vk, s_tau, S, KS, KB, GROUP, BT, SOURCE
    )
    o_g = i_n.to(tl.int64) * NG + tl.arange(0, NG)
    o_byte = o_g[:, None] * HALF + tl.arange(0, HALF)[None, :]
    m_byte = o_byte < N
    if BT == 1:
        b_even = tl.zeros((BM, NG, HALF), tl.float32)
        b_odd = tl.zeros((BM, NG, HALF), tl.float32)
    else:
        b_even = empty_sums(BT, BM, BN // 2, DOT)
        b_odd = empty_sums(BT, BM, BN // 2, DOT)
    for j in tl.range(0, trips(n_active), BM, num_stages=STAGES):
        o_p = j + tl.arange(0, BM)
        m_p = o_p < n_active
        b_k = next_ranks(lists, b_first, b_second, i_s, i_list, o_p, m_p, S, KB, BR, SOURCE)
        o_k = b_k.to(tl.int64)
        p_w = w + o_k[:, None, None] * s_wk + o_byte[None, :, :] * s_wn
        b_w = tl.load(p_w, mask=m_p[:, None, None] & m_byte[None, :, :], other=0, eviction_policy="evict_first")
        p_scale = scale + o_k[:, None] * s_sk + o_g[None, :] * s_sg
        m_scale = m_p[:, None] & (o_g * HALF < N)[None, :]
        b_scale = tl.load(p_scale, mask=m_scale, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_v = load_values(v, tau, b_k, m_p, T, s_vt, s_vk, s_tau, BT)
        if BT == 1:
            b_factor = (b_v[:, None] * b_scale)[:, :, None]
            b_even += nibble(b_w) * b_factor
            b_odd += nibble(b_w >> 4) * b_factor
        else:
            b_lo = tl.reshape(nibble(b_w) * b_scale[:, :, None], (BM, BN // 2))
            b_hi = tl.reshape(nibble(b_w >> 4) * b_scale[:, :, None], (BM, BN // 2))
            b_even = add_rows(b_even, b_v, b_lo, BT, DOT, OPERAND)
            b_odd = add_rows(b_odd, b_v, b_hi, BT, DOT, OPERAND)
    if BT == 1:
        b_even = tl.reshape(tl.sum(b_even, 0), (1, BN // 2))
        b_odd = tl.reshape(tl.sum(b_odd, 0), (1, BN // 2))
    else:
        b_even = finish_sums(b_even, BT, DOT)
        b_odd = finish_sums(b_odd, BT, DOT)
    o_pair = i_n.to(tl.int64) * (BN // 2) + tl.arange(0, BN // 2)
    o_n, m_n = o_pair * 2, o_pair < N
    if HAS_BIAS:
        b_even += tl.load(bias + o_n * s_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_odd += tl.load(bias + (o_n + 1) * s_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_t = tl.arange(0, BT)
    m_out = (o_t < T)[:, None] & m_n[None, :]
    p_out = out + i_s.to(tl.int64) * s_os + o_t.to(tl.int64)[:, None] * s_ot + o_n[None, :]
    tl.store(p_out, b_even.to(out.dtype.element_ty), mask=m_out)
    tl.store(p_out + 1, b_odd.to(out.dtype.element_ty), mask=m_out)
