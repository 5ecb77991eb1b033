"""When the C++ templates apply: rows of the registry for CPUs, compiled only. Nothing here imports Inductor.

Up to 8 tokens (CPU_TOKENS), a number that may vary for ``masked_gemv`` alone. Rows of the weight are contiguous; in 8 or 4 bits a
weight that is not stored so is copied, since nothing else could multiply by it. What surrounds an operation needs no fused form:
Inductor fuses it into the templates.
"""

from __future__ import annotations

import torch

from rana_fx.kernels.cost import prefers_rows_on_cpu
from rana_fx.kernels.problem import DTYPES, Problem
from rana_fx.kernels.registry import Implementation
from rana_fx.kernels.triton.config import CPU_TOKENS

STORED = (*DTYPES, torch.int8, torch.uint8)


def accepts_gemv(problem: Problem) -> str | None:
    """What all templates need."""
    if problem.tokens == 0:
        return f"no tokens, it takes 1 to {CPU_TOKENS}"
    if problem.most_tokens is None or problem.most_tokens > CPU_TOKENS:
        given = "an unknown number of" if problem.most_tokens is None else problem.most_tokens
        return f"{given} tokens, it takes up to {CPU_TOKENS}"
    if problem.rows is None or problem.columns is None:
        return "sizes of the weight vary"
    if problem.dtype not in DTYPES or problem.stored not in STORED:
        return f"does not multiply {problem.dtype} by {problem.stored}"
    return None if problem.quantized or problem.contiguous_rows else "rows of the weight are not contiguous"


def accepts_rows(problem: Problem) -> str | None:
    """What ``router`` and ``masked_rows`` need: they hold a number of tokens in registers."""
    if problem.tokens is None:
        return f"an unknown number of tokens, it takes 1 to {CPU_TOKENS}"
    return accepts_gemv(problem)


def slower_rows(problem: Problem) -> str | None:
    """Where masks of all tokens together are expected to cover too much (cost.py)."""
    assert problem.tokens is not None
    if prefers_rows_on_cpu(problem.tokens, problem.density, bits=problem.bits):
        return None
    return f"masks of {problem.tokens} tokens at density {problem.density:.2f} cover too much"


ROWS = (
    Implementation("masked_gemv", "cpp", "cpu", accepts_gemv, lower="rana_fx.passes.lower_cpp:masked_gemv"),
    Implementation("router", "cpp", "cpu", accepts_rows, lower="rana_fx.passes.lower_cpp:router"),
    Implementation("masked_rows", "cpp", "cpu", accepts_rows, slower_rows, lower="rana_fx.passes.lower_cpp:masked_rows"),
)
