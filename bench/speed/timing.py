"""Time GPU work the way decoding meets it: cold weights, no launch gaps of Python's, and the memory's own pace beside it.

In: callables, each on buffers of its own, together larger than L2. Out: microseconds per call as 20th, 50th and 80th percentile
of CUDA-graph replays that make all calls once. Without a GPU (smoke tests under Triton's interpreter) calls are
only made, and all times are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# an H200 has 50 MiB of L2, and a replay must not find in it what the last one left
ROTATION_BYTES = 400e6

Call = Callable[[], object]


class Times(NamedTuple):
    """Microseconds per call."""

    p20: float
    p50: float
    p80: float


def buffer_count(bytes_each: float, device: torch.device) -> int:
    """How many buffers of that size to rotate over."""
    return 1 if device.type == "cpu" else max(2, -int(-ROTATION_BYTES // bytes_each))


def timed(calls: list[Call], device: torch.device, *, replays: int = 25) -> Times:
    """Each call is made once first, outside of what is timed: kernels compile and counters are allocated there."""
    for call in calls:
        call()
    if device.type == "cpu":
        return Times(0.0, 0.0, 0.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    took = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / len(calls))
    found = torch.tensor(took, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return Times(*found.tolist())


def copy_gbps(device: torch.device) -> float:
    """What a large copy moves, read and written, in GB/s: the roofline of everything that streams weights.

    By a kernel: a graph's own copy node reaches two thirds of it (H200, torch 2.11).
    """
    if device.type == "cpu":
        return 0.0
    source, target = (torch.ones(1 << 28, device=device) for _ in range(2))
    return 2 * source.nbytes / timed([lambda: torch.neg(source, out=target)], device).p50 / 1e3


def error_ratio(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int, roundings: int = 1) -> float:
    """RMS error of a product over what it may be: that many times half an eps of its dtype, and fp32 sums in any order."""
    eps, rounding = torch.finfo(torch.float32).eps, roundings * torch.finfo(got.dtype).eps / 2
    if got.device.type == "cpu":
        rounding *= 2  # Triton's interpreter truncates to bfloat16
    bound = rounding * exact.norm() + 4 * eps * (torch.tensor(float(max(terms, 2))).log2() + 1).sqrt() * magnitude.norm()
    return ((got.double() - exact).norm() / bound).item()
