"""Split-K reduction in the same launch: the last program of a block to arrive adds the partials up (a semaphore per block).

Each program writes its fp32 partial, then adds one to its block's counter (an integer, acquire and release, GPU scope). The
program that finds all others counted adds the S partials in the order of slices, then bias, activation and residual, and sets the
counter back to zero. So nothing is zeroed per launch, the result does not depend on which program is last, and every run gives
the same bits. With one slice there are neither partials nor counters.

Counters are zeros that outlive launches, and launches that share some must not overlap. ``counters_for`` takes them from a ring
buffer per device, made once and never freed, since captured graphs hold addresses. Launches that overlap, on two streams or in
two graphs, share counters only if the ring went round between them, after some thousand launches. Where that can happen, launches
need counters of their own.

    ACT      0 none; else y_n = act(first_n) * second_n over the two halves of N columns, by gemv.ACTIVATION_CODES.
             A block is then the same columns of both halves, so that its last program has all operands.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import triton
import triton.language as tl

RING = 1 << 16
# whole lines of L2, so that launches at the same time do not contend for one
STEP = 32
_rings: dict[torch.device, Tensor] = {}
_next: dict[torch.device, int] = {}


def counters_for(device: torch.device, blocks: int) -> Tensor:
    """(blocks,) int32 zeros from the device's ring buffer; a launch leaves its counters zero."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if blocks > RING:
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    if device not in _rings:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # the graph zeroes these, in each replay, and owns their memory
            return torch.zeros(blocks, dtype=torch.int32, device=device)
        _rings[device], _next[device] = _zeros_that_outlive_calls(device), 0
    begin = _next[device] if _next[device] + blocks <= RING else 0
    _next[device] = begin + -(-blocks // STEP) * STEP
    return _rings[device][begin : begin + blocks]


def _zeros_that_outlive_calls(device: torch.device) -> Tensor:
    """The ring buffer of a device, in no memory pool of a CUDA graph.

    While Inductor warms a graph up for its capture, what the calling thread allocates comes from the graph's pool, where nothing
    may outlive the call (torch._inductor.cudagraph_trees). Pools are chosen by thread, so another one allocates.
    """
    with ThreadPoolExecutor(1) as other:
        zeros = other.submit(lambda: torch.zeros(RING, dtype=torch.int32, device=device)).result()
    if device.type == "cuda":
        # another stream may use them next
        torch.cuda.synchronize(device)
    return zeros


def partials_at_once(warps: int, block_n: int) -> int:
    """SR: partials added in one step, in 128 registers a thread. Each step waits for L2 once."""
    return min(max(128 * 32 * warps // block_n, 1), 32)


@triton.jit
def is_last(counters, i_p, COUNT: tl.constexpr):
    """Whether the COUNT - 1 other programs of counter i_p have arrived. What they wrote is visible to the last."""
    # the partial is written by all threads, the arrival by one
    tl.debug_barrier()
    return tl.atomic_add(counters + i_p, 1, sem="acq_rel", scope="gpu") == COUNT - 1


@triton.jit
def sum_of_partials(p_part, o_n, m_n, s_ps, bias, s_bias, S: tl.constexpr, SR: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Columns o_n of the S partials, added in order, and the bias."""
    b_y = (o_n * 0).to(tl.float32)
    for i_s in tl.range(0, S, SR, num_stages=1):
        o_s = i_s + tl.arange(0, SR)
        p = p_part + o_s.to(tl.int64)[:, None] * s_ps + o_n[None, :]
        # from L2: other programs wrote them
        b_y += tl.sum(tl.load(p, mask=(o_s < S)[:, None] & m_n[None, :], other=0.0, cache_modifier=".cg"), 0)
    if HAS_BIAS:
        b_y += tl.load(bias + o_n * s_bias, mask=m_n, other=0.0).to(tl.float32)
    return b_y


@triton.jit
def sigmoid(b_x):
    """Without overflow."""
    b_e = tl.exp(-tl.abs(b_x))
    return tl.where(b_x >= 0, 1.0, b_e) / (1 + b_e)


@triton.jit
def activated(b_y, ACT: tl.constexpr):
    if ACT == 1:
        b_y = b_y * sigmoid(b_y)
    elif ACT == 2:
        # 0.5 (1 + tanh u) = sigmoid(2 u)
        b_y = b_y * sigmoid(1.5957691216057308 * (b_y + 0.044715 * b_y * b_y * b_y))
    elif ACT == 3:
        # not the maximum, which is 0 for NaN
        b_y = tl.where(b_y < 0.0, 0.0, b_y)
    elif ACT == 4:
        b_y = 0.5 * b_y * (1.0 + tl.erf(0.7071067811865476 * b_y))
    return b_y


@triton.jit
def write(y, b_y, residual, o_t, o_n, m_y, s_rt, s_rn, s_yt, HAS_RESIDUAL: tl.constexpr):
    """Columns o_n of token o_t's result, the residual added."""
    if HAS_RESIDUAL:
        b_y += tl.load(residual + o_t * s_rt + o_n * s_rn, mask=m_y, other=0.0).to(tl.float32)
    tl.store(y + o_t * s_yt + o_n, b_y.to(y.dtype.element_ty), mask=m_y)


@triton.jit
def store_sums(
    b_y, part, y, bias, residual, i_s, i_t, i_t0, T, o_c, m_c, o_n, m_n, s_ps, s_pt, s_yt, s_bias, s_rt, s_rn,
    S: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Store a program's sums of columns o_c for token i_t0 + i_t: its partial or, with one slice, the result's columns o_n."""
    o_t = (i_t0 + i_t).to(tl.int64)
    m_sum = m_c & (o_c * 0 + o_t < T)
    if S > 1:
        tl.store(part + i_s.to(tl.int64) * s_ps + o_t * s_pt + o_c, b_y, mask=m_sum)
    else:
        if HAS_BIAS:
            b_y += tl.load(bias + o_c * s_bias, mask=m_sum, other=0.0).to(tl.float32)
        if ACT:
            b_both = tl.reshape(b_y, (2, BN // 2))
            o_h = tl.arange(0, 2)[:, None]
            b_y = activated(tl.sum(tl.where(o_h == 0, b_both, 0.0), 0), ACT) * tl.sum(tl.where(o_h == 1, b_both, 0.0), 0)
        write(y, b_y, residual, o_t, o_n, m_n & (o_n * 0 + o_t < T), s_rt, s_rn, s_yt, HAS_RESIDUAL)


@triton.jit
def reduce_partials(
    part, y, bias, residual, counters, i_p, i_t0, T, half, o_n, m_n, s_ps, s_pt, s_yt, s_bias, s_rt, s_rn,
    S: tl.constexpr, SR: tl.constexpr, BT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Arrive; if last, write columns o_n of the result for tokens i_t0 ... i_t0 + BT - 1. half: columns of the second half."""
    if is_last(counters, i_p, S):
        for i_t in tl.static_range(BT):
            o_t = (i_t0 + i_t).to(tl.int64)
            m_y = m_n & (o_n * 0 + o_t < T)
            p_part = part + o_t * s_pt
            b_y = sum_of_partials(p_part, o_n, m_y, s_ps, bias, s_bias, S, SR, HAS_BIAS)
            if ACT:
                b_y = activated(b_y, ACT) * sum_of_partials(p_part, o_n + half, m_y, s_ps, bias, s_bias, S, SR, HAS_BIAS)
            write(y, b_y, residual, o_t, o_n, m_y, s_rt, s_rn, s_yt, HAS_RESIDUAL)
        tl.store(counters + i_p, 0)
