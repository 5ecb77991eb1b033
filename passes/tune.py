"""The fastest launch config of a masked GEMV or router, by measuring a few on operands like those of the graph being lowered.

In: a problem, the layouts of its weight and scales, the configs and a launcher. Out: the config, measured once for similar shapes
(kernels/autotune.py). Used with Inductor's option ``max_autotune``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rana_fx.kernels import autotune
from rana_fx.kernels.problem import Problem

C = TypeVar("C")


def fastest(
    name: str,
    problem: Problem,
    stored: torch.Tensor,
    scale: torch.Tensor | None,
    choices: Sequence[C],
    launch: Callable[..., Any],
) -> C:
    """The fastest of the configs.

    Args:
        name: of the kernel and what it is compiled for besides the problem.
        stored, scale: fake tensors with the layouts of the weight and its scales.
        launch: (v, tau, weight, scale, config), of a router (x, weight, scale, config) -> the result, in one launch.
    """
    key = autotune.bucket(*problem.sizes, problem.density, problem.bits, problem.dtype)
    with unset_fake_temporarily():
        inputs = _inputs(problem)
        weights, scales = _operands(problem, stored, scale)

        def measure(config: C) -> float:
            return autotune.microseconds([functools.partial(launch, *inputs, weight, scales, config) for weight in weights])

        return autotune.fastest(f"{name} {key}", choices, measure)


def _inputs(problem: Problem) -> tuple[torch.Tensor, ...]:
    """A router's x, or v and a threshold that it reaches as often as is expected."""
    ranks, columns, tokens = problem.sizes
    is_router = problem.op in ("router", "normed_router")
    v = torch.randn(tokens, columns if is_router else ranks, device=problem.device).to(problem.dtype)
    if is_router:
        return (v,)
    threshold = v.float().square().flatten().quantile(1 - min(max(problem.density, 0.0), 1.0))
    return v, threshold.expand(ranks).contiguous()


def _operands(
    problem: Problem, stored: torch.Tensor, scale: torch.Tensor | None
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Weights to rotate over, and their scales."""
    ranks, columns, _ = problem.sizes
    weights = [
        torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype, device=problem.device).fill_(1)
        for _ in range(autotune.copies_of(ranks * columns * problem.bits / 8))
    ]
    return weights, None if scale is None else torch.ones(scale.shape, dtype=scale.dtype, device=problem.device)
