"""Verify logits before timing: the compiled model against the same plan run by the reference, in the same process.

In: a function that decodes a few fixed tokens from a fixed state and returns logits. Out: a ``CheckResult``; unless it
``passed``, the variant has no time. Two comparisons, both by relative RMSE of logits:

    fixed   thresholds replaced by 0 and infinity, drawn at the plan's densities: masks do not depend on rounding, so all results
            must agree to rounding
    masked  the plan's own thresholds. A v^2 within rounding of its threshold may be kept or dropped, and the difference
            propagates through the layers. The bound is the effect of a perturbation on the reference: its vectors are perturbed
            by one eps, at least 1e-4, since in fp32 a perturbation of one eps may change no mask although compilation does

Rounding errors add up as a random walk. A layer rounds about ten tensors, each by 0.2 eps of its size, in both versions; 1.5
times that is eps sqrt(2 layers). Sums of K terms in fp32 add eps32 sqrt(K) each, which matters for dtype fp32. Measured in bf16
on a CPU with 22 layers: fixed 0.010 (bound 0.052); masked 0.26, against 0.31 for the reference perturbed by one eps.

This holds where a layer propagates relative errors without amplification, as with random weights. Trained weights may amplify
them (saturated attention, outputs that are small differences of large ones), more so under drawn masks. The fixed bound is then
what the model itself makes of such errors: the gains of its norms, two a layer, are perturbed by an eps of their size, which is
eps sqrt(2 layers) where nothing is amplified, and the reference runs once more under the fixed masks. A wrong row or sum is far
above either: logits then have little in common, and the error is near 1.4.

Without a plan there is one comparison, with the eager form of the same weights, at the bound above. Some kernels of others add
parts of a sum to a 16-bit output atomically, in any order. The reference therefore runs twice; where twice the difference of
these runs is larger than the bound, it is the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from rana_fx.plan import Plan

_TIMES_NOISE = 2.0
_LEAST_STEP = 1e-4
# two unrelated results differ by 1.4; with a bound near that the comparison has no meaning
_MEANINGFUL = 1.0
# where no mask changes, more is not put down to rounding
_MOST_FIXED = 0.3
# of sums of 1000 terms in fp32
_SUMS = 32 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Expected:
    """The reference's logits with the plan's masks and with fixed masks, and how much rounding changes each.

    Without a plan, ``noise`` is the difference of two runs.
    """

    masked: Tensor
    fixed: Tensor | None = None
    noise: float = 0.0
    fixed_noise: float = 0.0


@dataclass(frozen=True)
class CheckResult:
    """Errors and bounds. ``fixed_error``: None without a plan. ``masked_bound``: None if rounding changes too many masks."""

    passed: bool
    masked_error: float
    masked_bound: float | None
    fixed_error: float | None
    fixed_bound: float
    noise: float

    def facts(self) -> dict[str, Any]:
        """The fields, for a row."""
        return asdict(self)


def bound(dtype: torch.dtype, layers: int, terms: int) -> float:
    """Largest relative RMSE between logits of two correct versions of one computation."""
    rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * terms**0.5)
    return float((2 * layers) ** 0.5 * rounding)


def relative_rmse(got: Tensor, expected: Tensor) -> float:
    """Relative RMSE; infinite where a value is not finite."""
    wide = expected.double()
    error = float((got.double() - wide).norm() / wide.norm())
    return error if error == error else inf


def record_expected(
    run: Callable[[], Tensor], model: nn.Module, plan: Plan | None, *, dtype: torch.dtype, seed: int = 0
) -> Expected:
    """Record the reference's logits. ``run`` must run the reference."""
    masked = run()
    if plan is None:
        return Expected(masked, noise=relative_rmse(run(), masked))
    eps = torch.finfo(dtype).eps
    with fixed_masks(plan, seed=seed):
        fixed = run()
        with perturbed(model, max(eps, _SUMS), seed=seed, by_size=True):
            fixed_noise = relative_rmse(run(), fixed)
    with perturbed(model, max(eps, _LEAST_STEP), seed=seed):
        noise = relative_rmse(run(), masked)
    return Expected(masked, fixed, noise, fixed_noise)


def of_noise(limit: float, noise: float) -> float:
    """The bound where no mask changes: ``limit``, or twice what the reference itself varies by, as far as that is rounding."""
    return max(limit, min(_TIMES_NOISE * noise, _MOST_FIXED))


def check_logits(run: Callable[[], Tensor], plan: Plan | None, expected: Expected, *, limit: float, seed: int = 0) -> CheckResult:
    """Compare ``run`` of the version to be timed with the reference's logits for the same seed."""
    masked_error = relative_rmse(run(), expected.masked)
    if plan is None or expected.fixed is None:
        allowed = of_noise(limit, expected.noise)
        return CheckResult(masked_error <= allowed, masked_error, allowed, None, limit, expected.noise)
    with fixed_masks(plan, seed=seed):
        fixed_error = relative_rmse(run(), expected.fixed)
    fixed_bound = max(limit, min(expected.fixed_noise, _MOST_FIXED))
    allowed = _TIMES_NOISE * max(expected.noise, limit)
    within = masked_error <= allowed if allowed <= _MEANINGFUL else masked_error < inf
    return CheckResult(
        passed=fixed_error <= fixed_bound and within,
        masked_error=masked_error,
        masked_bound=allowed if allowed <= _MEANINGFUL else None,
        fixed_error=fixed_error,
        fixed_bound=fixed_bound,
        noise=expected.noise,
    )


@contextmanager
def fixed_masks(plan: Plan, *, seed: int) -> Iterator[None]:
    """Inside, thresholds of the attached plan are 0 with the probability of the density, else infinity. Thresholds on outputs,
    which may be negative, are minus infinity instead of 0.
    """
    masks = [(adapter.tau, adapter.density, 0.0) for adapter in plan.adapters]
    # masks in front of routers
    masks += [(adapter.router_tau, adapter.router_density, 0.0) for adapter in plan.adapters if adapter.router_tau is not None]
    masks += [(adapter.exact_tau, adapter.exact_density, -inf) for adapter in plan.adapters if adapter.exact_tau is not None]
    saved = [tau.clone() for tau, _, _ in masks]
    try:
        for index, (tau, density, always) in enumerate(masks):
            generator = torch.Generator(tau.device).manual_seed(seed + index)
            draw = torch.rand(tau.shape, generator=generator, device=tau.device)
            tau.copy_(torch.where(draw < density, always, inf))
        yield
    finally:
        for (tau, _, _), old in zip(masks, saved, strict=True):
            tau.copy_(old)


@contextmanager
def perturbed(model: nn.Module, step: float, *, seed: int, by_size: bool = False) -> Iterator[None]:
    """Inside, ``step`` times normal noise is added to every vector of the model (norms, biases).

    by_size: the noise is relative to the vector's RMS, where that is not zero.
    """
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    saved = [vector.detach().clone() for vector in vectors]
    try:
        with torch.no_grad():
            for index, vector in enumerate(vectors):
                generator = torch.Generator(vector.device).manual_seed(seed + index)
                normal = torch.randn(vector.shape, generator=generator, device=vector.device).to(vector.dtype)
                size = float(vector.float().square().mean().sqrt()) if by_size else 1.0
                vector.add_(normal, alpha=step * (size or 1.0))
        yield
    finally:
        with torch.no_grad():
            for vector, old in zip(vectors, saved, strict=True):
                vector.copy_(old)
