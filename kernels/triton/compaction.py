"""Building blocks of the kernels: which ranks a program works on, how it lists the active ones and adds up their rows.

Slice i_s of S takes ranks GROUP at a time in turn (rank k belongs to slice k // GROUP % S), because the ranks of an adapter
are sorted by energy: contiguous slices would give one program all the work.

A program compacts its slice into its own stretch of global memory: the ranks that some token keeps, in rising order, then each
token's values there in fp32, 0 where that token drops the rank, times the row's scale where rows have one; filled up to whole
row blocks with rank 0 and value 0. The loop behind it reads neighbouring entries, several at once, and has no masks. The
stretch is (1 + BT, KB + BM) int32, values by their bits.

Sums: a block of rows is added up before it meets the accumulators, of which a token has RW * BN, not BM * BN. RW is the number
of warps that lie along the rows (config.py: a warp spans 512 bytes), so that this stays inside a thread.

Legend: i_ program index, o_ offsets, m_ mask, p_ pointers, b_ loaded block; KS ranks of a slice, KB the power of two above, BM
rows at a time, BN outputs, BT tokens. Arguments of compiled functions carry no types but tl.constexpr: Inductor copies their
source.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rana_fx.kernels.triton.config import H200_SM_COUNT

INTERPRETED = triton.knobs.runtime.interpret


if INTERPRETED:

    def loop_bound(count):
        """A loop bound. Triton 3.6 interprets scalars as arrays of one element, which NumPy 2.4 no longer takes as integers."""
        return int(count.handle.data.item())

else:

    @triton.jit
    def loop_bound(count):
        return count


def sm_count_of(x: Tensor) -> int:
    """Multiprocessors of the device an operand is on; under the interpreter those of an H200."""
    count: int = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else H200_SM_COUNT
    return count


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before this one is done, then let the next one start, up to where it waits for this one.

    Before this call only memory that no kernel writes may be read, and nothing written. The wait comes first: when the next
    kernel starts, all kernels before this one are then done, and Inductor's own early launches rely on that.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def column_offsets(i_n, half, N, BN: tl.constexpr, ACT: tl.constexpr):
    """Columns of block i_n, and which of them exist: BN in a row or, with an activation, the same BN / 2 of both halves."""
    o_n = tl.arange(0, BN)
    if ACT:
        HALF: tl.constexpr = BN // 2
        o_p = i_n.to(tl.int64) * HALF + o_n % HALF
        o_c = o_p + o_n // HALF * half
        m_c = o_p < half
    else:
        o_c = i_n.to(tl.int64) * BN + o_n
        m_c = o_c < N
    return o_c, m_c


@triton.jit
def ranks_of(o_r, i_s, S: tl.constexpr, GROUP: tl.constexpr):
    """Ranks at offsets o_r of slice i_s."""
    return (o_r // GROUP) * (GROUP * S) + i_s * GROUP + o_r % GROUP


@triton.jit
def constants_of(tau, scale, b_k, m_k, s_tau, s_sk, SCALED: tl.constexpr):
    """Thresholds and scales of ranks b_k, fp32: what can be read before v is computed."""
    o_k = b_k.to(tl.int64)
    b_tau = tl.load(tau + o_k * s_tau, mask=m_k, other=0.0, eviction_policy="evict_last").to(tl.float32)
    b_scale = b_tau
    if SCALED:
        b_scale = tl.load(scale + o_k * s_sk, mask=m_k, other=0.0).to(tl.float32)
    return b_tau, b_scale


@triton.jit
def kept_values(v, b_tau, b_scale, b_k, m_k, T, s_vt, s_vk, BT: tl.constexpr, SCALED: tl.constexpr):
    """Where some token keeps rank b_k, and a tuple with each token's values there: fp32, 0 where that token drops it."""
    o_k = b_k.to(tl.int64)
    b_vs = ()
    m_any = b_k < 0
    for i_t in tl.static_range(BT):
        # a block, not a scalar: Triton 3.9 interprets scalar & block as integers
        m_t = m_k if BT == 1 else m_k & (b_k * 0 + i_t < T)
        # 64 bits for the token, too: rows of a view may lie far apart
        b_v = tl.load(v + (o_k * 0 + i_t) * s_vt + o_k * s_vk, mask=m_t, other=0.0, eviction_policy="evict_last").to(tl.float32)
        # NaN is below no threshold: it is kept, as in the dense model
        m_v = m_t & ~(b_v * b_v < b_tau)
        b_vs = b_vs + (tl.where(m_v, b_v, 0.0),)
        m_any = m_any | m_v
    if SCALED:
        b_scaled = ()
        for i_t in tl.static_range(BT):
            b_scaled = b_scaled + (b_vs[i_t] * b_scale,)
        b_vs = b_scaled
    return m_any, b_vs


@triton.jit
def list_ranks(
    v, tau, scale, p_list, i_s, T, K, s_vt, s_vk, s_tau, s_sk,
    S: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr, BM: tl.constexpr,
    BT: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the slice's list to p_list, without its first EARLY ranks, and return its length. Waits for the previous kernel.

    A long slice is listed CB ranks at a time, so that they fit into registers.
    """
    CB: tl.constexpr = KB if KB < 4096 else 4096
    n_active = i_s * 0
    for i_c in tl.static_range(KB // CB):
        o_r = i_c * CB + tl.arange(0, CB)
        b_k = ranks_of(o_r, i_s, S, GROUP)
        m_k = (o_r >= EARLY) & (o_r < KS) & (b_k < K)
        b_tau, b_scale = constants_of(tau, scale, b_k, m_k, s_tau, s_sk, SCALED)
        if i_c == 0:
            wait_for_previous(PDL)
        m_any, b_vs = kept_values(v, b_tau, b_scale, b_k, m_k, T, s_vt, s_vk, BT, SCALED)
        b_one = m_any.to(tl.int32)
        o_p = n_active + tl.cumsum(b_one, 0) - 1
        n_active += tl.sum(b_one, 0)
        tl.store(p_list + o_p, b_k, mask=m_any)
        for i_t in tl.static_range(BT):
            tl.store(p_list + (1 + i_t) * (KB + BM) + o_p, b_vs[i_t].to(tl.int32, bitcast=True), mask=m_any)
    o_fill = n_active + tl.arange(0, BM)
    for i_l in tl.static_range(1 + BT):
        tl.store(p_list + i_l * (KB + BM) + o_fill, o_fill * 0)
    # other threads wrote what this one reads
    tl.debug_barrier()
    return n_active


@triton.jit
def listed_values(p_list, o_p, LENGTH: tl.constexpr, BT: tl.constexpr):
    """Each token's values at entries o_p of a list of that length."""
    b_vs = ()
    for i_t in tl.static_range(BT):
        b_vs = b_vs + (tl.load(p_list + (1 + i_t) * LENGTH + o_p).to(tl.float32, bitcast=True),)
    return b_vs


@triton.jit
def load_rows(p_w, m_n, WHOLE: tl.constexpr):
    """Rows at pointers (rows, columns). WHOLE: all columns exist."""
    if WHOLE:
        b_w = tl.load(p_w, eviction_policy="evict_first")
    else:
        b_w = tl.load(p_w, mask=m_n[None, :], other=0, eviction_policy="evict_first")
    return b_w


@triton.jit
def zero_accumulators(BT: tl.constexpr, RW: tl.constexpr, BN: tl.constexpr):
    """A tuple of BT accumulators, (RW, BN) fp32."""
    b_sums = ()
    for _ in tl.static_range(BT):
        b_sums = b_sums + (tl.zeros((RW, BN), tl.float32),)
    return b_sums


@triton.jit
def summed(b_rows, RW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows of any shape -> (RW, BN): row r is added to accumulator r % RW."""
    return tl.sum(tl.reshape(b_rows, (BM // RW, RW, BN)), 0)


@triton.jit
def add_rows(b_sums, b_vs, b_w, BT: tl.constexpr, RW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Each token's accumulators plus its values times the rows b_w (BM, BN), fp32."""
    b_more = ()
    for i_t in tl.static_range(BT):
        b_more = b_more + (b_sums[i_t] + summed(b_w * b_vs[i_t][:, None], RW, BM, BN),)
    return b_more
