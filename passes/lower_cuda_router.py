"""``rana::router`` and ``rana::normed_router`` on tensor cores: a call of the kernel's operation, with its config.

In: a problem that kernels/cuda/router_implementations.py accepts, and Inductor IR of the operation's arguments, (tokens, ...).
Out: IR of the result in the dtype of the activations. lower_cuda.py says why it is a call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._inductor.lowering import fallback_handler

from rana_fx.kernels import cost
from rana_fx.kernels.cuda.router_config import RouterConfig, configs, default_config
from rana_fx.kernels.problem import Problem
from rana_fx.passes import tune
from rana_fx.passes.launch import fake, realized, starts_early


def router(problem: Problem, x_TD: Any, weight: Any, scale: Any) -> Any:
    """(T, R), in one launch."""
    return normed_router(problem, x_TD, None, weight, scale, None, 0.0)


def normed_router(problem: Problem, x_TD: Any, gain: Any, weight: Any, scale: Any, eps: float | None, offset: float) -> Any:
    """(T, R), in one launch. With ``eps``, of x after its root-mean-square norm."""
    from rana_fx.kernels.cuda import router_op

    x, gain, weight, scale = realized(x_TD, gain, weight, scale)
    early = starts_early(x, (weight, scale, gain))
    config = _config(problem, fake(weight), fake(scale), early)
    call = fallback_handler(router_op.router_tensor_cores, add_to_fallback_set=False)
    return call(x, gain, weight, scale, eps, offset, list(dataclasses.astuple(config)), early)


def _config(problem: Problem, stored: Any, scale: Any, early: bool) -> RouterConfig:
    """The default config, or with max_autotune the fastest of a few."""
    from rana_fx.kernels.cuda.router import router as launched

    def launch(x: Any, weight: Any, scales: Any, config: RouterConfig) -> Any:
        return launched(x, weight, scales, config=config, early=early)

    facts: dict[str, Any] = dict(bits=problem.bits, sm_count=cost.nearest(problem.device).sm_count)
    if not torch._inductor.config.max_autotune:
        return default_config(*problem.sizes, **facts)
    name = f"router tensor_cores{' early' if early else ''}"
    return tune.fastest(name, problem, stored, scale, configs(*problem.sizes, **facts), launch)
