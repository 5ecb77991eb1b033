"""Time GPU kernels under the conditions of decoding: weights not in L2, no launch gaps from Python; and the copy bandwidth.

In: callables, each with buffers of its own, together larger than L2. Out: microseconds per call, as 20th, 50th and 80th
percentile over replays of a CUDA graph of all calls. Without a GPU (tests under Triton's interpreter) each call runs once, and
all times are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# well above the L2 cache (50 MiB on an H200), so that a replay reads all weights from memory
ROTATION_BYTES = 400e6

Call = Callable[[], object]


class Times(NamedTuple):
    """Microseconds per call."""

    p20: float
    p50: float
    p80: float


def buffer_count(bytes_each: float, device: torch.device) -> int:
    """Number of buffers of that size to rotate over."""
    return 1 if device.type == "cpu" else max(2, -int(-ROTATION_BYTES // bytes_each))


def timed(calls: list[Call], device: torch.device, *, replays: int = 25) -> Times:
    """Time the calls. Each runs once before, untimed, to compile kernels and allocate counters."""
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
    """Bandwidth of a large copy, read and written, in GB/s: the roofline of matmuls of few tokens.

    Measured with a kernel: a copy node of a CUDA graph reaches two thirds of its bandwidth (H200, torch 2.11).
    """
    if device.type == "cpu":
        return 0.0
    source, target = (torch.ones(1 << 28, device=device) for _ in range(2))
    return 2 * source.nbytes / timed([lambda: torch.neg(source, out=target)], device).p50 / 1e3


def error_ratio(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int, roundings: int = 1) -> float:
    """RMS error of a matmul over its bound: ``roundings`` times eps / 2 of its dtype, plus fp32 sums in any order."""
    eps, rounding = torch.finfo(torch.float32).eps, roundings * torch.finfo(got.dtype).eps / 2
    if got.device.type == "cpu":
        rounding *= 2  # Triton's interpreter truncates to bfloat16
    bound = rounding * exact.norm() + 4 * eps * (torch.tensor(float(max(terms, 2))).log2() + 1).sqrt() * magnitude.norm()
    return ((got.double() - exact).norm() / bound).item()
