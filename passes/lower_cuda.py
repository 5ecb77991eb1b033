"""``rana::masked_gemv`` and fused forms on tensor cores: a call of the kernel's operation, with its config.

In: a problem that kernels/cuda/implementations.py accepts, and Inductor IR of the operation's arguments without ``density``,
(tokens, ...). Out: IR of the result in the dtype of the activations.

Inductor knows no CUDA C++, so the launch is an operation that its code calls: some microseconds of Python for each, which a CUDA
graph (mode "reduce-overhead") does not repeat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor.lowering import fallback_handler

from rana_fx.kernels.cuda.config import Config, configs, default_config
from rana_fx.kernels.gemv import forms
from rana_fx.kernels.problem import Problem
from rana_fx.passes import tune
from rana_fx.passes.launch import fake, realized, starts_early


def _masked_gemv(
    problem: Problem,
    v_TK: Any,
    tau: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    *,
    residual: Any = None,
    activation: str | None = None,
    gain: Any = None,
    eps: float | None = None,
    offset: float = 0.0,
) -> Any:
    """(T, N), or (T, N / 2) with an activation, in one launch. With ``eps``, of v after its root-mean-square norm."""
    from rana_fx.kernels.cuda import op

    v, tau, weight, scale, bias, residual, gain = realized(v_TK, tau, weight, scale, bias, residual, gain)
    early = starts_early(v, (tau, weight, scale, bias, gain))
    config = _config(problem, fake(weight), fake(scale), activation, early)
    call = fallback_handler(op.masked_gemv_tensor_cores, add_to_fallback_set=False)
    fields = list(dataclasses.astuple(config))
    return call(v, tau, weight, bias, scale, residual, activation, gain, eps, offset, fields, early)


masked_gemv, masked_gemv_add, masked_gemv_gated = forms(_masked_gemv)


def masked_gemv_normed(
    problem: Problem, v_TK: Any, gain: Any, tau: Any, weight: Any, bias: Any, scale: Any, activation: str | None,
    eps: float, offset: float,
) -> Any:  # fmt: skip
    """The same of v after its norm, in one launch."""
    facts: dict[str, Any] = dict(activation=activation, gain=gain, eps=eps, offset=offset)
    return _masked_gemv(problem, v_TK, tau, weight, bias, scale, **facts)


def masked_gemv_parts(problem: Problem, v_TK: Any, taus: Sequence[Any], weights: Sequence[Any], biases: Sequence[Any]) -> Any:
    """(T, sum of N), in one launch."""
    from rana_fx.kernels.cuda import op

    v, *rest = realized(v_TK, *taus, *weights, *biases)
    count = len(weights)
    early = starts_early(v, rest)
    # measured as one weight of all columns
    whole = torch.empty(problem.sizes[:2], dtype=problem.stored, device="meta")
    config = _config(problem, whole, None, None, early)
    call = fallback_handler(op.masked_gemv_parts_tensor_cores, add_to_fallback_set=False)
    parts = rest[:count], rest[count : 2 * count], rest[2 * count :]
    return call(v, *parts, list(dataclasses.astuple(config)), early)


def _config(problem: Problem, stored: Any, scale: Any, activation: str | None, early: bool) -> Config:
    """The default config, or with max_autotune the fastest of a few."""
    from rana_fx.kernels.cuda.masked_gemv import masked_gemv

    def launch(v: Any, tau: Any, weight: Any, scales: Any, config: Config) -> Any:
        return masked_gemv(v, tau, weight, None, scales, activation=activation, config=config, early=early)

    facts: dict[str, Any] = dict(bits=problem.bits, gated=activation is not None)
    if not torch._inductor.config.max_autotune:
        return default_config(*problem.sizes, **facts)
    name = f"tensor_cores {activation or 'linear'}{' early' if early else ''}"
    return tune.fastest(name, problem, stored, scale, configs(*problem.sizes, **facts), launch)
