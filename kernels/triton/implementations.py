"""When the Triton kernels apply and when a dense matmul is expected to be faster: rows of the registry for NVIDIA GPUs.

    masked_gemv, _add, _gated, _parts   up to 16 tokens; compiled, where the cost model expects them to be faster (cost.py)
    masked_rows                         up to 4 tokens, where the cost model expects it to be faster
    router, normed_router               up to 4 tokens of a floating weight, whose matmul reads it as fast beyond and multiplies
                                        faster; up to 16 of one in 8 or 4 bits

In eager mode the reference is several launches, and unpacks a weight in 8 or 4 bits: all of them up to 4 tokens of a floating
weight, up to 16 of others. Nothing here imports Triton.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from rana_fx.kernels import cost
from rana_fx.kernels.gemv import forms
from rana_fx.kernels.problem import DTYPES, Problem
from rana_fx.kernels.registry import Implementation
from rana_fx.kernels.triton.config import COUNTERS, MAX_TOKENS, MOST_PARTS, TOKENS_AT_ONCE, cdiv

PACKED = (torch.int8, torch.uint8)


def accepts(problem: Problem) -> str | None:
    """What all kernels need."""
    if not _installed():
        return "Triton is not installed"
    if problem.dtype not in DTYPES or (problem.quantized and problem.stored not in PACKED):
        return f"does not multiply {problem.dtype} by {problem.stored}"
    if problem.tokens is None or problem.rows is None or problem.columns is None:
        return "sizes vary: the kernels are launched for one number of tokens"
    if not 1 <= problem.tokens <= MAX_TOKENS:
        return f"{problem.tokens} tokens, it takes 1 to {MAX_TOKENS}"
    return None


def accepts_gemv(problem: Problem) -> str | None:
    """What ``masked_gemv`` needs, alone or with a residual or an activation."""
    reason = accepts(problem)
    if reason is not None or not problem.compiled:
        return reason
    _, columns, tokens = problem.sizes
    # blocks have 64 columns or more; room for two parts that end within a block
    blocks = (cdiv(columns, 64) + 2) * cdiv(tokens, TOKENS_AT_ONCE)
    return f"{columns} columns may need {blocks} counters of {COUNTERS}" if blocks > COUNTERS else None


def accepts_parts(problem: Problem) -> str | None:
    """What ``masked_gemv_parts`` needs."""
    if not 2 <= problem.weights <= MOST_PARTS:
        return f"{problem.weights} weights, it takes 2 to {MOST_PARTS}"
    if problem.quantized or not problem.alike or not problem.contiguous_rows:
        return "weights are not all floating, of one dtype, with contiguous rows"
    return accepts_gemv(problem)


def few(problem: Problem) -> str | None:
    """Of more tokens a matmul of a floating weight is faster, of which it reads every row."""
    if problem.quantized or problem.tokens is None or problem.tokens <= TOKENS_AT_ONCE:
        return None
    return f"a matmul of a floating weight is faster for more than {TOKENS_AT_ONCE} tokens, these are {problem.tokens}"


def skips(problem: Problem) -> str | None:
    """Compiled, a row that is skipped has to be memory that is not read; the cost model then compares."""
    if not problem.compiled:
        return few(problem)
    return None if problem.quantized or problem.contiguous_rows else "rows of the weight are not contiguous"


def skips_of_few(problem: Problem) -> str | None:
    """Of ``masked_rows`` both."""
    return few(problem) or skips(problem)


def gemv_us(problem: Problem) -> float | None:
    """Compiled: cost.masked_us."""
    if not problem.compiled:
        return None
    return cost.masked_us(*problem.sizes, problem.density, cost.nearest(problem.device), bits=problem.bits)


def router_us(problem: Problem) -> float | None:
    """Compiled: cost.triton_router_us."""
    if not problem.compiled:
        return None
    return cost.triton_router_us(*problem.sizes, cost.nearest(problem.device), bits=problem.bits)


def rows_us(problem: Problem) -> float | None:
    """Compiled: cost.rows_us."""
    if not problem.compiled:
        return None
    return cost.rows_us(*problem.sizes, problem.density, cost.nearest(problem.device), bits=problem.bits)


def launch_gemv(*operands: Any, **fused: Any) -> Tensor:
    from rana_fx.kernels.triton.masked_gemv import masked_gemv

    return masked_gemv(*operands, **fused)


def launch_normed(x: Tensor, gain: Tensor | None, weight: Tensor, scale: Tensor | None, eps: float, offset: float) -> Tensor:
    from rana_fx.kernels.triton.router import router

    return router(x, weight, scale, gain=gain, eps=eps, offset=offset)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _row(op: str, launch: Any, **facts: Any) -> Implementation:
    return Implementation(op, "triton", "cuda", launch=launch, lower=f"rana_fx.passes.lower_triton:{op}", **facts)


_KERNELS = "rana_fx.kernels.triton"
_GEMV = dict(accepts=accepts_gemv, slower=skips, cost=gemv_us)
_PARTS = _GEMV | dict(accepts=accepts_parts)
_plain, _add, _gated = forms(launch_gemv)
ROWS = (
    _row("masked_gemv", _plain, **_GEMV),
    _row("masked_gemv_add", _add, **_GEMV),
    _row("masked_gemv_gated", _gated, **_GEMV),
    _row("masked_gemv_parts", f"{_KERNELS}.masked_gemv_concat:masked_gemv_parts", **_PARTS),
    _row("masked_rows", f"{_KERNELS}.masked_rows:masked_rows", accepts=accepts, slower=skips_of_few, cost=rows_us),
    _row("router", f"{_KERNELS}.router:router", accepts=accepts, slower=few, cost=router_us),
    _row("normed_router", launch_normed, accepts=accepts, slower=few, cost=router_us),
)
