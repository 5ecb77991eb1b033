"""Building blocks of the gathering kernels: which ranks a program works on, and what it does with their rows.

Slice i_s of S takes ranks GROUP at a time in turn (rank k belongs to slice k // GROUP % S), because the ranks of an adapter
come sorted by energy: contiguous slices would give one program all the work. GROUP = KS gives contiguous slices.

SOURCE says where the list of active ranks comes from. All three give the same list, in rising order, so the same bits.

    0 scratch    the program compacts its slice into its own stretch of global memory, waits, and reads it back
    1 registers  the list is never written: entry p is the one rank whose running count of active ranks is p + 1
    2 listed     the router's launch has left a list and a count per block of ranks: entry p is found by a prefix of counts

Legend: i_ program index, o_ offsets, m_ mask, p_ pointers, b_ loaded block; KB ranks (or blocks of ranks) of a slice, BM rows
at a time, BN outputs, BT tokens. Arguments of compiled functions carry no types but tl.constexpr: Inductor copies their source.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret


if INTERPRETED:

    def trips(count):
        """A loop bound. Triton 3.6 interprets scalars as arrays of one element, which NumPy 2.4 no longer takes as integers."""
        return int(count.handle.data.item())

else:

    @triton.jit
    def trips(count):
        return count


@triton.jit
def open_ranks(
    v, tau, lists, counts, i_s, i_list, T, K, s_vt, s_vk, s_tau,
    S: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, BT: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The active ranks of a slice, of any token: two blocks that ``next_ranks`` reads, and how many there are."""
    o_r = tl.arange(0, KB)
    if SOURCE == 2:
        # K counts blocks of ranks here
        o_b = o_r * S + i_s
        b_first = tl.load(counts + o_b, mask=o_b < K, other=0, eviction_policy="evict_last")
        b_second = tl.cumsum(b_first, 0)
        n_active = tl.sum(b_first, 0)
    else:
        b_first = (o_r // GROUP) * (GROUP * S) + i_s * GROUP + o_r % GROUP
        m_k = (o_r < KS) & (b_first < K)
        b_tau = tl.load(tau + b_first.to(tl.int64) * s_tau, mask=m_k, other=0.0, eviction_policy="evict_last").to(tl.float32)
        m_any = o_r < 0
        for i_t in tl.static_range(BT):
            # a block, not a scalar: Triton 3.9 interprets scalar & block as integers
            m_t = m_k & (tl.full((KB,), i_t, tl.int32) < T)
            p_v = v + i_t * s_vt + b_first.to(tl.int64) * s_vk
            b_v = tl.load(p_v, mask=m_t, other=0.0, eviction_policy="evict_last").to(tl.float32)
            m_any = m_any | (m_t & (b_v * b_v >= b_tau))
        b_one = m_any.to(tl.int32)
        b_position = tl.cumsum(b_one, 0) - 1
        n_active = tl.sum(b_one, 0)
        b_second = tl.where(m_any, b_position, -1)
        if SOURCE == 0:
            tl.store(lists + i_list * KB + b_position, b_first, mask=m_any)
            # other warps wrote what this one reads
            tl.debug_barrier()
    return b_first, b_second, n_active


@triton.jit
def next_ranks(
    lists, b_first, b_second, i_s, i_list, o_p, m_p,
    S: tl.constexpr, KB: tl.constexpr, BR: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """Entries o_p of the list, 0 where m_p is false."""
    if SOURCE == 0:
        b_k = tl.load(lists + i_list * KB + o_p, mask=m_p, other=0)
    elif SOURCE == 1:
        b_k = tl.sum(tl.where(b_second[:, None] == o_p[None, :], b_first[:, None], 0), 0)
    else:
        m_before = b_second[:, None] <= o_p[None, :]
        o_b = tl.sum(m_before.to(tl.int32), 0)
        o_in = o_p - tl.sum(tl.where(m_before, b_first[:, None], 0), 0)
        b_k = tl.load(lists + (o_b * S + i_s) * BR + o_in, mask=m_p, other=0)
    return b_k


@triton.jit
def load_values(v, tau, b_k, m_p, T, s_vt, s_vk, s_tau, BT: tl.constexpr):
    """v at the listed ranks, fp32: (BM,) for one token, else (BT, BM) with each token's own mask applied."""
    o_k = b_k.to(tl.int64)
    if BT == 1:
        # every listed rank is active for the only token
        b_v = tl.load(v + o_k * s_vk, mask=m_p, other=0.0, eviction_policy="evict_last").to(tl.float32)
    else:
        o_t = tl.arange(0, BT)
        p_v = v + o_t.to(tl.int64)[:, None] * s_vt + o_k[None, :] * s_vk
        m_v = (o_t < T)[:, None] & m_p[None, :]
        b_v = tl.load(p_v, mask=m_v, other=0.0, eviction_policy="evict_last").to(tl.float32)
        b_tau = tl.load(tau + o_k * s_tau, mask=m_p, other=0.0, eviction_policy="evict_last").to(tl.float32)
        # by selection: an infinite value that is dropped must not become NaN
        b_v = tl.where(b_v * b_v >= b_tau[None, :], b_v, 0.0)
    return b_v


@triton.jit
def empty_sums(BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr):
    """fp32 zeros. Without tl.dot the BM rows keep sums of their own, added once at the end: no reduction inside the loop."""
    if DOT:
        b_sum = tl.zeros((BT, BN), tl.float32)
    elif BT == 1:
        b_sum = tl.zeros((BM, BN), tl.float32)
    else:
        b_sum = tl.zeros((BT, BM, BN), tl.float32)
    return b_sum


@triton.jit
def add_rows(b_sum, b_v, b_w, BT: tl.constexpr, DOT: tl.constexpr, OPERAND: tl.constexpr):
    """b_sum + the outer products of values and rows, summed over rows (DOT) or not yet."""
    if DOT:
        # tf32x3 matters only where OPERAND is fp32: three products recover what tf32 rounds away
        b_sum = tl.dot(b_v.to(OPERAND), b_w.to(OPERAND), b_sum, input_precision="tf32x3")
    elif BT == 1:
        b_sum += b_w.to(tl.float32) * b_v[:, None]
    else:
        b_sum += b_w.to(tl.float32)[None, :, :] * b_v[:, :, None]
    return b_sum


@triton.jit
def finish_sums(b_sum, BT: tl.constexpr, DOT: tl.constexpr):
    """(BT, BN)."""
    if DOT:
        b_y = b_sum
    elif BT == 1:
        b_y = tl.sum(b_sum, 0)[None, :]
    else:
        b_y = tl.sum(b_sum, 1)
    return b_y
