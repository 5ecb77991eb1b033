"""When the kernel on tensor cores applies: rows of the registry for NVIDIA GPUs of compute capability 9.0.

    masked_gemv, _add, _gated    weights in 16, 8 and 4 bits whose rows are multiples of 16 bytes, up to 16 tokens
    masked_gemv_normed           the same, up to 4 tokens
    masked_gemv_parts            such weights in 16 bits

What it does not take, the Triton kernels do, and weights in 16 bits where they are expected to be faster. Nothing here compiles a
kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rana_fx.errors import KernelNotCompiled
from rana_fx.kernels import cost
from rana_fx.kernels.cuda.config import MOST_SHARED_BYTES, default_config, most_shared_bytes
from rana_fx.kernels.gemv import forms
from rana_fx.kernels.problem import Problem
from rana_fx.kernels.registry import Implementation
from rana_fx.kernels.triton.config import MAX_TOKENS, MOST_PARTS, TOKENS_AT_ONCE
from rana_fx.kernels.triton.implementations import few

NAME = "tensor_cores"
# of a rank's row: what one copy takes, and where it begins
ALIGNMENT = 16


def accepts(problem: Problem) -> str | None:
    """What the kernel needs."""
    if problem.dtype not in (torch.bfloat16, torch.float16) or problem.stored not in (torch.int8, torch.uint8, problem.dtype):
        return f"multiplies bfloat16 and float16 by 8 and 4 bits and by their own dtype, not {problem.dtype} by {problem.stored}"
    if problem.tokens is None or problem.rows is None or problem.columns is None:
        return "sizes vary: the kernel is launched for one number of tokens"
    if not 1 <= problem.tokens <= MAX_TOKENS:
        return f"{problem.tokens} tokens, it takes 1 to {MAX_TOKENS}"
    if not problem.contiguous_rows or problem.alignment % ALIGNMENT or problem.columns * problem.bits // 8 % ALIGNMENT:
        return f"rows of {problem.columns} columns in {problem.bits} bits are not made of aligned {ALIGNMENT} bytes"
    if problem.bits == 4 and problem.scale_alignment % 4:
        return "rows of scales do not begin at multiples of 4 bytes"
    if problem.gated and (reason := _halves(problem)) is not None:
        return reason
    config = default_config(*problem.sizes, bits=problem.bits, gated=problem.gated)
    need = most_shared_bytes(config, problem.rows, problem.tokens, problem.bits)
    if need > MOST_SHARED_BYTES:
        return f"lists of {problem.rows} ranks for {problem.tokens} tokens need {need} bytes of shared memory"
    return _device(problem.device)


def _halves(problem: Problem) -> str | None:
    """In 8 and 4 bits halves are whole segments of 256 columns, so that the scales of both begin at multiples of 4 bytes; in 16
    bits both begin at multiples of what one copy takes.
    """
    whole = 256 if problem.quantized else ALIGNMENT * 8 // problem.bits
    return f"halves of {problem.columns} columns are no multiples of {whole}" if problem.sizes[1] % (2 * whole) else None


def accepts_normed(problem: Problem) -> str | None:
    """Each block reads all values of all tokens for their norms."""
    if problem.tokens is not None and problem.tokens > TOKENS_AT_ONCE:
        return f"{problem.tokens} tokens, with a norm it takes 1 to {TOKENS_AT_ONCE}"
    return accepts(problem)


def accepts_parts(problem: Problem) -> str | None:
    """Weights in 16 bits."""
    if not 2 <= problem.weights <= MOST_PARTS:
        return f"{problem.weights} weights, it takes 2 to {MOST_PARTS}"
    if not problem.alike or problem.stored != problem.dtype:
        return "weights are not all of the dtype of the activations"
    return accepts(problem)


def slower(problem: Problem) -> str | None:
    """In eager mode as the Triton kernels; compiled, what they are expected to compute faster, and what no CUDA graph replays."""
    if not problem.compiled:
        return few(problem)
    return without_graph() or faster_by_triton(problem)


def without_graph() -> str | None:
    """Compiled code calls the launcher in Python, longer than Inductor's launches of Triton kernels, unless a graph replays."""
    from torch._inductor import config

    return (
        None if config.triton.cudagraphs else "is launched from Python, which only a CUDA graph repeats without (reduce-overhead)"
    )


def faster_by_triton(problem: Problem) -> str | None:
    """Where the Triton kernel is expected to be faster. Of weights in 8 and 4 bits it unpacks each number for each token."""
    if problem.quantized:
        return None
    device = cost.nearest(problem.device)
    mine, its = (us(*problem.sizes, problem.density, device, bits=16) for us in (cost.tensor_core_us, cost.masked_us))
    return None if mine <= its else f"{mine:.1f} us expected, {its:.1f} us of the Triton kernel"


def gemv_us(problem: Problem) -> float | None:
    """Compiled: cost.tensor_core_us."""
    if not problem.compiled:
        return None
    return cost.tensor_core_us(*problem.sizes, problem.density, cost.nearest(problem.device), bits=problem.bits)


@functools.lru_cache
def _device(device: torch.device) -> str | None:
    from rana_fx.kernels.cuda import masked_gemv

    return unable(device, masked_gemv.load_smallest)


def unable(device: torch.device, load_smallest: Callable[[torch.device], None]) -> str | None:
    """Why a kernel cannot run there, or None. It is compiled and loaded once: if that fails, the Triton kernels compute."""
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"is for compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    try:
        load_smallest(device)
    except KernelNotCompiled as error:
        return str(error)
    return None


def _launch(*operands: Any, **fused: Any) -> Tensor:
    from rana_fx.kernels.cuda.masked_gemv import masked_gemv

    return masked_gemv(*operands, **fused)


def _launch_normed(
    v: Tensor, gain: Tensor | None, tau: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    activation: str | None, eps: float, offset: float,
) -> Tensor:  # fmt: skip
    from rana_fx.kernels.cuda.masked_gemv import Norm, masked_gemv

    return masked_gemv(v, tau, weight, bias, scale, activation=activation, norm=Norm(gain, eps, offset))


def _launch_parts(*operands: Any) -> Tensor:
    from rana_fx.kernels.cuda.masked_gemv_parts import masked_gemv_parts

    return masked_gemv_parts(*operands)


def _row(op: str, launch: Any, accepts: Any) -> Implementation:
    return Implementation(
        op,
        NAME,
        "cuda",
        accepts=accepts,
        slower=slower,
        cost=gemv_us,
        launch=launch,
        lower=f"rana_fx.passes.lower_cuda:{op}",
    )


_plain, _add, _gated = forms(_launch)
ROWS = (
    _row("masked_gemv", _plain, accepts),
    _row("masked_gemv_add", _add, accepts),
    _row("masked_gemv_gated", _gated, accepts),
    _row("masked_gemv_normed", _launch_normed, accepts_normed),
    _row("masked_gemv_parts", _launch_parts, accepts_parts),
)
