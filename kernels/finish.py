"""Who adds the partials up: the last program to arrive, in the same launch.

Each program writes its fp32 partial, then adds one to its block's counter (an integer, acquire and release, GPU scope). The one
that finds all others counted adds the S partials in the order of slices, bias and activation too, and sets the counter back to
zero. So nothing is zeroed per launch, nothing depends on who came last, and every run gives the same bits.

Counters are zeros that outlive launches: ``counters_for`` keeps them per device and stream. Launches that share counters must
not overlap. Inside a stream, and inside a captured graph, they do not; two graphs captured on one stream and replayed on two
at once would. Give such launches counters of their own.

    SUM      0 leave partials to the caller     1 add them up
    ACT      0 none; else y_n = act(first_n) * second_n over the two halves of N columns: 1 silu, 2 tanh-GELU, 3 ReLU.
             Both halves of a place count on one counter, so its last program has all it needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"silu": 1, "gelu_tanh": 2, "relu": 3}
# enough for a million outputs in blocks of 256; a longer product gets its own
COUNTERS = 4096
# captured graphs hold addresses: counters are never freed
_counters: dict[tuple[int, int, int], Tensor] = {}


def counters_for(device: torch.device, blocks: int) -> Tensor:
    """Zeros that every launch leaves zero: (>= blocks,) int32, of this device and its current stream."""
    index, stream = -1, 0
    if device.type == "cuda":
        current = torch.cuda.current_stream(device)
        index, stream = current.device_index, current.cuda_stream
    size = max(COUNTERS, triton.next_power_of_2(blocks))
    key = (index, stream, size)
    if key not in _counters:
        _counters[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return _counters[key]


def partials_at_once(warps: int, block_n: int) -> int:
    """SR: partials that are added in one step, in about 64 registers a thread: more would cost the main loop its occupancy."""
    return min(max(64 * 32 * warps // block_n, 1), 16)


@triton.jit
def is_last(counters, i_c, COUNT: tl.constexpr):
    """Whether the COUNT - 1 other programs of counter i_c have arrived. What they wrote is visible to the last."""
    # the partial is written by all threads, the arrival by one
    tl.debug_barrier()
    return tl.atomic_add(counters + i_c, 1, sem="acq_rel", scope="gpu") == COUNT - 1


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
        b_y = tl.maximum(b_y, 0.0)
    return b_y


@triton.jit
def finish(
    part, y, bias, counters, i_c, i_t0, T, half, o_c, m_c, s_ps, s_pt, s_yt, s_bias,
    S: tl.constexpr, SR: tl.constexpr, BT: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Arrive; if last, write columns o_c of the result for tokens i_t0 ... i_t0 + BT - 1. half: columns of the second half."""
    if is_last(counters, i_c, 2 * S if ACT else S):
        for i_t in tl.static_range(BT):
            o_t = (i_t0 + i_t).to(tl.int64)
            m_y = m_c & (o_c * 0 + o_t < T)
            p_part = part + o_t * s_pt
            b_y = sum_of_partials(p_part, o_c, m_y, s_ps, bias, s_bias, S, SR, HAS_BIAS)
            if ACT:
                b_y = activated(b_y, ACT) * sum_of_partials(p_part, o_c + half, m_y, s_ps, bias, s_bias, S, SR, HAS_BIAS)
            tl.store(y + o_t * s_yt + o_c, b_y.to(y.dtype.element_ty), mask=m_y)
        tl.store(counters + i_c, 0)
