"""No speed of a wrong result: the compiled model against the same plan run by the reference, in the same process.

In: a function that decodes a few fixed tokens from a fixed state and returns logits. Out: a ``Verdict``; ``passed`` or no row
with a time. Two comparisons, both by relative RMSE of logits:

    fixed   thresholds replaced by 0 and infinity, drawn at the plan's densities: which rows count does not depend on rounding,
            so every product, sum and index must agree to rounding
    masked  the plan's own thresholds. A v^2 within rounding of its threshold may fall on either side, and the difference spreads
            through the layers, so the bound is what such a step does to the reference: its vectors are moved by one eps, or by
            1e-4, since in fp32 a step of one eps may cross no threshold where the compiled model crosses one

Rounding errors add up as a random walk. A layer rounds about ten tensors, each by 0.2 eps of its size, in both versions: half as
much again is eps sqrt(2 layers). Sums of K terms in fp32 add eps32 sqrt(K) each, which matters where the dtype is fp32. Measured
in bf16 on a CPU with 22 layers: fixed 0.010 (bound 0.052); masked 0.26, where moving the reference by one eps makes 0.31.

That is where a layer hands errors on as large as it gets them, relative to what it computes, as random weights do. Trained
weights may enlarge them (saturated attention, outputs that are small differences of large ones), the more under masks that were
drawn: there the fixed bound is what the model itself makes of such errors. The gains of its norms, two a layer, are moved by an
eps of their size, which is eps sqrt(2 layers) again where nothing is enlarged, and the reference runs once more under the fixed
masks. What a wrong row or sum does is far above either: logits then have little in common, an error near 1.4.
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
# two unrelated results differ by 1.4; near it a comparison says nothing
_MEANINGFUL = 1.0
# of fixed masks, which no rounding changes, more is not put down to rounding
_MOST_FIXED = 0.3
# of sums of 1000 terms in fp32
_SUMS = 32 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Expected:
    """The reference's logits, with the plan's masks and with fixed ones, and what rounding does to each."""

    masked: Tensor
    fixed: Tensor | None = None
    noise: float = 0.0
    fixed_noise: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Errors and their bounds; ``fixed_error`` is None without a plan, ``masked_bound`` None where rounding decides too much."""

    passed: bool
    masked_error: float
    masked_bound: float | None
    fixed_error: float | None
    fixed_bound: float
    noise: float

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def bound(dtype: torch.dtype, layers: int, terms: int) -> float:
    """Relative RMSE of logits that two correct versions of one computation may differ by."""
    rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * terms**0.5)
    return float((2 * layers) ** 0.5 * rounding)


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative RMSE; infinite where a value is not finite."""
    wide = expected.double()
    error = float((got.double() - wide).norm() / wide.norm())
    return error if error == error else inf


def expect(run: Callable[[], Tensor], model: nn.Module, plan: Plan | None, *, dtype: torch.dtype, seed: int = 0) -> Expected:
    """Record what the reference says. ``run`` must use it."""
    masked = run()
    if plan is None:
        return Expected(masked)
    eps = torch.finfo(dtype).eps
    with fixed_masks(plan, seed=seed):
        fixed = run()
        with moved(model, max(eps, _SUMS), seed=seed, by_size=True):
            fixed_noise = relative(run(), fixed)
    with moved(model, max(eps, _LEAST_STEP), seed=seed):
        noise = relative(run(), masked)
    return Expected(masked, fixed, noise, fixed_noise)


def judge(run: Callable[[], Tensor], plan: Plan | None, expected: Expected, *, limit: float, seed: int = 0) -> Verdict:
    """Compare ``run``, now of the version that is to be timed, with what the reference said under the same seed."""
    masked_error = relative(run(), expected.masked)
    if plan is None or expected.fixed is None:
        return Verdict(masked_error <= limit, masked_error, limit, None, limit, 0.0)
    with fixed_masks(plan, seed=seed):
        fixed_error = relative(run(), expected.fixed)
    fixed_bound = max(limit, min(expected.fixed_noise, _MOST_FIXED))
    allowed = _TIMES_NOISE * max(expected.noise, limit)
    within = masked_error <= allowed if allowed <= _MEANINGFUL else masked_error < inf
    return Verdict(
        passed=fixed_error <= fixed_bound and within,
        masked_error=masked_error,
        masked_bound=allowed if allowed <= _MEANINGFUL else None,
        fixed_error=fixed_error,
        fixed_bound=fixed_bound,
        noise=expected.noise,
    )


@contextmanager
def fixed_masks(plan: Plan, *, seed: int) -> Iterator[None]:
    """Thresholds of the attached plan, in place: 0 with the probability of the density, else infinity; on outputs, which may be
    negative, minus infinity for 0.
    """
    masks = [(adapter.tau, adapter.density, 0.0) for adapter in plan.adapters]
    # in front of routers
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
def moved(model: nn.Module, step: float, *, seed: int, by_size: bool = False) -> Iterator[None]:
    """Every vector of the model (norms, biases) moved by ``step`` times a normal number, in place.

    by_size: and times the vector's RMS, where that is not zero.
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
