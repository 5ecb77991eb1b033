"""When the router on tensor cores applies: rows of the registry for NVIDIA GPUs of compute capability 9.0.

    router, normed_router    weights in 4, 8 and 16 bits whose rows are multiples of 16 bytes, up to 16 tokens

What it does not take, the Triton kernels do. Nothing here compiles a kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rana_fx.kernels import cost
from rana_fx.kernels.cuda.config import MOST_SHARED_BYTES
from rana_fx.kernels.cuda.implementations import ALIGNMENT, NAME, unable, without_graph
from rana_fx.kernels.cuda.router_config import default_config, most_shared_bytes
from rana_fx.kernels.problem import Problem
from rana_fx.kernels.registry import Implementation
from rana_fx.kernels.triton.config import MAX_TOKENS


def accepts(problem: Problem) -> str | None:
    """What the kernel needs."""
    stored = (torch.int8, torch.uint8, problem.dtype)
    if problem.dtype not in (torch.bfloat16, torch.float16) or problem.stored not in stored:
        return f"multiplies bfloat16 and float16 by 4 and 8 bits and their own dtype, not {problem.dtype} by {problem.stored}"
    if not (problem.tokens and problem.rows and problem.columns):
        return "sizes vary or are zero: the kernel is launched for one number of tokens"
    if problem.tokens > MAX_TOKENS:
        return f"{problem.tokens} tokens, it takes 1 to {MAX_TOKENS}"
    if not problem.contiguous_rows or problem.alignment % ALIGNMENT or problem.columns * problem.bits // 8 % ALIGNMENT:
        return f"rows of {problem.columns} columns in {problem.bits} bits are not made of aligned {ALIGNMENT} bytes"
    config = default_config(*problem.sizes, bits=problem.bits)
    need = most_shared_bytes(config, problem.columns, problem.tokens, problem.bits)
    if need > MOST_SHARED_BYTES:
        return f"{problem.tokens} tokens of {problem.columns} columns need {need} bytes of shared memory"
    return _device(problem.device)


def slower(problem: Problem) -> str | None:
    """One token's products are few: the Triton kernel reads weights as fast, and its launch is shorter."""
    if problem.tokens == 1:
        return "one token, whose products the Triton kernel computes as fast as it reads"
    return without_graph() if problem.compiled else None


def router_us(problem: Problem) -> float | None:
    """Compiled: cost.router_us."""
    if not problem.compiled:
        return None
    return cost.router_us(*problem.sizes, cost.nearest(problem.device), bits=problem.bits)


@functools.lru_cache
def _device(device: torch.device) -> str | None:
    from rana_fx.kernels.cuda import router

    return unable(device, router.load_smallest)


def _launch(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    from rana_fx.kernels.cuda.router import router

    return router(x, weight, scale)


def _launch_normed(x: Tensor, gain: Tensor | None, weight: Tensor, scale: Tensor | None, eps: float, offset: float) -> Tensor:
    from rana_fx.kernels.cuda.router import router

    return router(x, weight, scale, gain=gain, eps=eps, offset=offset)


def _row(op: str, launch: Any) -> Implementation:
    lower = f"rana_fx.passes.lower_cuda_router:{op}"
    return Implementation(op, NAME, "cuda", accepts, slower=slower, cost=router_us, launch=launch, lower=lower)


ROWS = (_row("router", _launch), _row("normed_router", _launch_normed))
