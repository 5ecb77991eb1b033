"""``rana::masked_gemv`` and fused forms on tensor cores: a call of the kernel's operation, with its config.

In: a problem that kernels/cuda/implementations.py accepts, and Inductor IR of the operation's arguments without ``density``,
(tokens, ...). Out: IR of the result in the dtype of the activations.

Inductor knows no CUDA C++, so the launch is an operation that its code calls: some microseconds of Python for each, which a CUDA
graph (mode "reduce-overhead") does not repeat.
"""

from __future__ import annotations

from typing import Any

from torch._inductor.lowering import fallback_handler

from rana_fx.kernels import cost
from rana_fx.kernels.problem import Problem
from rana_fx.passes.launch import realized, starts_early


def masked_gemv(problem: Problem, v_TK: Any, tau: Any, weight: Any, bias: Any, scale: Any) -> Any:
    """(T, N)."""
    return _masked_gemv(problem, v_TK, tau, weight, bias, scale)


def masked_gemv_add(problem: Problem, v_TK: Any, tau: Any, weight: Any, bias: Any, scale: Any, residual_TN: Any) -> Any:
    """(T, N), in one launch."""
    return _masked_gemv(problem, v_TK, tau, weight, bias, scale, residual_TN=residual_TN)


def masked_gemv_gated(problem: Problem, v_TK: Any, tau: Any, weight: Any, bias: Any, scale: Any, activation: str) -> Any:
    """(T, N / 2), in one launch."""
    return _masked_gemv(problem, v_TK, tau, weight, bias, scale, activation=activation)


def _masked_gemv(
    problem: Problem,
    v_TK: Any,
    tau: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    *,
    residual_TN: Any = None,
    activation: str | None = None,
) -> Any:
    from rana_fx.kernels.cuda import op
    from rana_fx.kernels.cuda.config import default_config

    v, tau, weight, scale, bias, residual = realized(v_TK, tau, weight, scale, bias, residual_TN)
    early = starts_early(v, (tau, weight, scale, bias))
    sm_count = cost.nearest(problem.device).sm_count
    gated = activation is not None
    config = default_config(*problem.sizes, problem.density, sm_count, bits=problem.bits, gated=gated)
    call = fallback_handler(op.masked_gemv_tensor_cores, add_to_fallback_set=False)
    fields = [config.segments, config.warps, config.splits, config.stages]
    return call(v, tau, weight, bias, scale, residual, activation, fields, early)
