"""Baselines for the masked matmul in ``bench.kernels``: dense matmuls, and the kind of kernel that others published.

    cublas      F.linear with the dense weight (N, K)
    inductor    the same, by torch.compile with max-autotune and coordinate descent
    published   masked loads, split-K, fp32 atomic additions to a zeroed output, as in TEAL, WINA and CATS; one token
    fallback    the matmul of this package where masks are not expected to save time: dense, with the masked input, compiled

The published kernel is reimplemented here, with the best of a few block sizes. Its output stays fp32: the time of the cast to the
model's dtype is not included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def published_kernel(v, tau, w, y, K, N, s_wk, BK: tl.constexpr, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k, m_n = o_k < K, o_n < N
    b_v = tl.load(v + o_k, mask=m_k, other=0.0).to(tl.float32)
    m_v = m_k & (b_v * b_v >= tl.load(tau + o_k, mask=m_k, other=0.0))
    p_w = w + o_k.to(tl.int64)[:, None] * s_wk + o_n[None, :]
    b_w = tl.load(p_w, mask=m_v[:, None] & m_n[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.atomic_add(y + o_n, tl.sum(b_w * tl.where(m_v, b_v, 0.0)[:, None], 0), mask=m_n)


# (block_k, block_n, warps); large block_k, so that few programs add to one output atomically
PUBLISHED = [(64, 128, 4), (128, 64, 4), (128, 128, 8), (256, 32, 4), (256, 64, 8), (512, 16, 4)]


def published(v: Tensor, tau: Tensor, weight: Tensor, choice: tuple[int, int, int]) -> Tensor:
    """The published kernel: v (1, K), tau (K,), weight (K, N) -> (1, N) fp32. ``choice``: an entry of ``PUBLISHED``."""
    block_k, block_n, warps = choice
    ranks, columns = weight.shape
    y = torch.zeros((1, columns), dtype=torch.float32, device=v.device)
    grid = (triton.cdiv(columns, block_n), triton.cdiv(ranks, block_k))
    published_kernel[grid](v, tau, weight, y, ranks, columns, weight.stride(0), BK=block_k, BN=block_n, num_warps=warps)
    return y


def cublas_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K), weight (N, K) -> (T, N)."""
    return torch.nn.functional.linear(x, weight)


def silu_of_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up with gate and up the halves of the product: two more launches in eager mode."""
    return silu_of_halves(torch.nn.functional.linear(x, weight))


def silu_of_halves(product: Tensor) -> Tensor:
    """silu(gate) * up with gate and up the halves of (T, 2 N)."""
    gate, up = product.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def by_inductor(function: Callable[..., Tensor], *, tuned: bool) -> Callable[..., Tensor]:
    """The function, compiled by Inductor at its first call. ``tuned``: max-autotune with coordinate descent."""
    # Dynamo caches by code object, and falls back to dynamic shapes or eager mode after a few shapes
    torch._dynamo.reset()
    options: dict[str, Any] = {"max_autotune": True, "coordinate_descent_tuning": True} if tuned else {}
    return torch.compile(function, dynamic=False, options={**options, "triton.cudagraphs": False})
