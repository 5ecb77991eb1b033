"""``rana::masked_gemv``, ``router``, ``masked_rows`` and fused forms on a GPU: the launch of a kernel, with its config.

In: a problem that the kernels accept and are expected to be fast at (kernels/triton/implementations.py), and Inductor IR of the
operation's arguments without ``density``, (tokens, ...). Out: IR of the result in the dtype of the activations.

The launch reduces the partial sums of split-K itself. As a pointwise sum in Inductor's graph the reduction was a separate kernel
wherever two slices of the result were read (q, k and v; gate and up: 1.8 us), and ran on one multiprocessor where a norm followed
(9.6 us; Llama-2-7B shapes, H200, torch 2.11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rana_fx.kernels import cost
from rana_fx.kernels.gemv import forms
from rana_fx.kernels.problem import Problem
from rana_fx.kernels.triton.config import Config, Launch, configs, default_config
from rana_fx.passes import tune
from rana_fx.passes.launch import counters, fake, realized, starts_early, traced


@dataclass(frozen=True, eq=False)
class _Launch:
    """The facts that a config is chosen by.

    stored, scale: fake tensors with the layout of the weight. early: whether the launch may start before the kernel before it
    ends.
    """

    problem: Problem
    stored: torch.Tensor | None
    scale: torch.Tensor | None
    activation: str | None
    early: bool


def masked_gemv_parts(problem: Problem, v_TK: Any, taus: Sequence[Any], weights: Sequence[Any], biases: Sequence[Any]) -> Any:
    """(T, sum of N), in one launch."""
    from rana_fx.kernels.triton import masked_gemv_concat

    count = len(weights)
    operands = realized(v_TK, *taus, *weights, *biases)
    ranks, columns, _ = problem.sizes
    whole = torch.empty((ranks, columns), dtype=problem.stored, device="meta")
    early = starts_early(operands[0], operands[1 : 1 + 2 * count])
    config = _config(_Launch(problem, whole, None, None, early))
    operands.append(counters(v_TK.get_device()))

    def launch(v: Any, *rest: Any) -> Any:
        parts = rest[:count], rest[count : 2 * count], rest[2 * count : -1]
        return masked_gemv_concat.masked_gemv_parts(
            v, *parts, config=config, counters=rest[-1], how=Launch(traced=True, pdl=early)
        )

    return traced(launch, operands, key=("masked_gemv_parts", config, count, len(biases), early))


def router(problem: Problem, x_TI: Any, weight: Any, scale: Any) -> Any:
    """(T, R)."""
    return normed_router(problem, x_TI, None, weight, scale, None, 0.0)


def normed_router(
    problem: Problem,  # noqa: ARG001
    x_TI: Any,
    gain: Any,
    weight: Any,
    scale: Any,
    eps: float | None,
    offset: float,
) -> Any:
    """(T, R). With ``eps``, of x after its root-mean-square norm."""
    from rana_fx.kernels.triton import router as kernel

    operands = realized(x_TI, weight, scale, gain)
    early = starts_early(operands[0], operands[1:])

    def launch(x: Any, weight: Any, scale: Any, gain: Any) -> Any:
        return kernel.router(x, weight, scale, gain=gain, eps=eps, offset=offset, how=Launch(traced=True, pdl=early))

    return traced(launch, operands, key=("router", eps, offset, early))


def masked_rows(problem: Problem, x_TK: Any, a_TN: Any, weight: Any, bias: Any) -> Any:  # noqa: ARG001
    """(T, N)."""
    from rana_fx.kernels.triton import masked_rows as kernel

    operands = realized(x_TK, a_TN, weight, bias)
    # the kernel reads nothing before the kernel that computes a is done
    early = starts_early(operands[1], ())

    def launch(x: Any, a: Any, weight: Any, bias: Any) -> Any:
        return kernel.masked_rows(x, a, weight, bias, how=Launch(traced=True, pdl=early))

    return traced(launch, operands, key=("masked_rows", early))


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
) -> Any:
    """(T, N), or (T, N / 2) with an activation, in one launch."""
    from rana_fx.kernels.triton import masked_gemv as kernel

    operands = realized(v_TK, tau, weight, scale)
    early = starts_early(operands[0], operands[1:])
    config = _config(_Launch(problem, fake(operands[2]), fake(operands[3]), activation, early))
    operands += [*realized(bias, residual), counters(v_TK.get_device())]

    def launch(v: Any, tau: Any, weight: Any, scale: Any, bias: Any, residual: Any, zeros: Any) -> Any:
        epilogue: dict[str, Any] = dict(residual=residual, activation=activation, counters=zeros)
        return kernel.masked_gemv(v, tau, weight, bias, scale, config=config, how=Launch(traced=True, pdl=early), **epilogue)

    return traced(launch, operands, key=("masked_gemv", config, activation, early))


masked_gemv, masked_gemv_add, masked_gemv_gated = forms(_masked_gemv)


def _config(wanted: _Launch) -> Config:
    """The default config, or with max_autotune the fastest of a few."""
    problem = wanted.problem
    given = *problem.sizes, problem.density, cost.nearest(problem.device).sm_count
    if torch._inductor.config.max_autotune:
        return _fastest(wanted, configs(*given, bits=problem.bits))
    return default_config(*given, bits=problem.bits)


def _fastest(wanted: _Launch, choices: list[Config]) -> Config:
    """The fastest config, measured."""
    from rana_fx.kernels.triton.masked_gemv import masked_gemv

    def launch(v: torch.Tensor, tau: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, config: Config) -> Any:
        how = Launch(pdl=wanted.early)
        return masked_gemv(v, tau, weight, scale=scale, activation=wanted.activation, config=config, how=how)

    assert wanted.stored is not None
    name = f"masked_gemv {wanted.activation or 'linear'}{' early' if wanted.early else ''}"
    return tune.fastest(name, wanted.problem, wanted.stored, wanted.scale, choices, launch)
