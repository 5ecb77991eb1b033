"""One example: build, plan, compile, call, and compare with the oracle.

In: a spec. Out: an ``Outcome``: "right"; "near" where a value is too close to its threshold to decide; "refused" with an error
class of the package; "unsupported" where PyTorch does not compile the model without a plan either; or a fault: "wrong", "dense"
(the plan was not applied, and no report), "crash".
"""

from __future__ import annotations

import contextlib
import copy
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rana_fx
from bench.fuzz.model import VOCAB, Cache, Transformer, build, empty_cache
from bench.fuzz.oracle import NEAR, Oracle
from bench.fuzz.plans import plan_for
from bench.fuzz.spec import Spec
from rana_fx import _backend, notices
from rana_fx.errors import RanaError
from rana_fx.plan import Plan

FAULTS = ("wrong", "dense", "crash")


@dataclass(frozen=True)
class Outcome:
    """``kind``: see above. ``detail``: a number, or a message. ``declined``: number of places reported as not applied."""

    kind: str
    detail: str = ""
    declined: int = 0


def attempt(spec: Spec, device: torch.device, *, lowered: bool) -> Outcome:
    """Run one example. lowered: through Inductor; else the rewritten graph runs with eager kernels."""
    torch._dynamo.reset()
    notices.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _attempt(spec, device, lowered)
    except Exception as error:
        inner = getattr(error, "inner_exception", None) or error
        message = f"{type(inner).__name__}: {str(inner)[:300]}"
        if isinstance(inner, RanaError):
            return Outcome("refused", message)
        where = traceback.format_exc(limit=-3)[-600:]
        if _fails_without_plan(spec, device, lowered):
            return Outcome("unsupported", message)
        return Outcome("crash", message + where)
    finally:
        torch._dynamo.reset()


def _fails_without_plan(spec: Spec, device: torch.device, lowered: bool) -> bool:
    """Whether PyTorch's own backend raises an error on the model as it is."""
    torch._dynamo.reset()
    model = build(spec).to(device)
    fast = torch.compile(model, backend="inductor" if lowered else "eager", dynamic=spec.dynamic or None)
    try:
        with warnings.catch_warnings(), torch.set_grad_enabled(spec.gradients):
            warnings.simplefilter("ignore")
            for ids in _tokens(spec, list(spec.calls), device):
                logits, _ = fast(ids)
                if spec.gradients:
                    logits.float().square().mean().backward()
    except Exception:
        return True
    return False


def _attempt(spec: Spec, device: torch.device, lowered: bool) -> Outcome:
    model = build(spec).to(device)
    batches = [(ids,) for ids in _tokens(spec, [(4, 16)] * 6, device)]
    plan = plan_for(model, spec, batches)
    original = copy.deepcopy(model)
    if not spec.as_option:
        rana_fx.attach(model, plan)
    options: dict[str, Any] = {"prefill": spec.prefill} | ({"plan": plan} if spec.as_option else {})
    options |= {"strict": True} if spec.strict else {}
    worst, places = Outcome("right"), set[str]()
    with _declined() as declined, _without_inductor(enabled=not lowered), torch.set_grad_enabled(spec.gradients):
        compiled = torch.compile(model, backend=rana_fx.backend, options=options, dynamic=spec.dynamic or None)
        pair = _Pair(spec, compiled, model, original, plan, declined)
        for place, ids in enumerate(_tokens(spec, list(spec.calls), device)):
            outcome = pair.sequence(ids, gradients=spec.gradients and place == 0)
            places |= declined
            if outcome.kind != "right":
                worst = outcome if worst.kind in ("right", "near") else worst
    return Outcome(worst.kind, worst.detail, len(places))


@dataclass(frozen=True)
class _Pair:
    """The compiled model and what its oracle is made of. declined: linears left dense in the graphs compiled so far."""

    spec: Spec
    compiled: Any
    model: Transformer
    original: Transformer
    plan: Plan
    declined: set[str]

    def sequence(self, ids: Tensor, *, gradients: bool) -> Outcome:
        """Compare one call with the oracle; with a cache, then a decoded token after the cached ones."""
        start, cache = None, None
        if self.spec.cache != "none" and self.spec.attention != "none":
            cache, start = empty_cache(self.spec, len(ids), self.original.embed.weight), torch.tensor(0, device=ids.device)
        wide = None if cache is None else [(k.double(), v.double()) for k, v in cache]
        outcome, kept, wide = self._call(ids, cache, wide, start, gradients=gradients)
        if outcome.kind == "right" and start is not None and ids.shape[1] < 40:
            outcome, _, _ = self._call(ids[:, :1], kept, wide, start + ids.shape[1])
        return outcome

    def _call(
        self, ids: Tensor, cache: Cache | None, wide: Cache | None, start: Tensor | None, *, gradients: bool = False
    ) -> tuple[Outcome, Cache, Cache]:
        if self.spec.prefill in ("dense", "cheapest"):
            # whether a call is dense depends on its tokens: each call is compiled, so that its declined linears are its own
            torch._dynamo.reset()
            self.declined.clear()
        got, kept = self.compiled(ids, cache, start)
        oracle = Oracle(self.original, self.plan, without=self.declined)
        expected, wide_kept = oracle.model(ids, wide, start)
        outcome = _compare(self.spec, got, expected, oracle, self.original, self.plan, ids)
        if outcome.kind == "right" and gradients:
            outcome = _gradients(self.model, got, oracle, expected)
        return outcome, kept, wide_kept


def _compare(
    spec: Spec, got: Tensor, expected: Tensor, oracle: Oracle, original: Transformer, plan: Plan, ids: Tensor
) -> Outcome:
    error = _relative(got.detach(), expected.detach())
    allowed = _tolerance(spec)
    if error > allowed and not spec.gradients:
        allowed += 8 * _rounding(original, ids)  # of models that amplify rounding errors
    if error <= allowed:
        return Outcome("right")
    if oracle.margin < NEAR:
        return Outcome("near", f"{oracle.margin:.1e}")
    if spec.cache == "none" and plan.adapters:
        with torch.no_grad():
            dense, _ = copy.deepcopy(original).double()(ids)
        if _relative(got.detach(), dense) <= _tolerance(spec):
            return Outcome("dense", f"relative distance to the plan {error:.2e}")
    return Outcome("wrong", f"relative distance {error:.2e}, allowed {allowed:.1e}")


def _gradients(model: Transformer, got: Tensor, oracle: Oracle, expected: Tensor) -> Outcome:
    got.float().square().mean().backward()
    expected.square().mean().backward()
    mine, right = model.embed.weight.grad, oracle.model.embed.weight.grad
    assert mine is not None and right is not None
    error = _relative(mine, right)
    allowed = 30 * _tolerance(model.spec)
    return Outcome("right") if error <= allowed else Outcome("wrong", f"gradient off by {error:.2e}, allowed {allowed:.1e}")


def _tolerance(spec: Spec) -> float:
    """Bound of the relative error: about ten tensors per layer are rounded to their dtype; fp32 sums have up to 66 terms."""
    eps = torch.finfo(getattr(torch, spec.dtype)).eps
    return 64 * eps if spec.dtype == "float32" else 12 * eps * (10 * spec.layers) ** 0.5


def _rounding(original: Transformer, ids: Tensor) -> float:
    """Relative error of the dense model in its own dtype against fp64: the larger one of these ids and of a fixed text.

    How much a model amplifies rounding depends on its input; a single decoded token says nothing of the cached ones.
    """
    wide, fixed = copy.deepcopy(original).double(), torch.arange(32, device=ids.device).reshape(2, 16)
    with torch.no_grad():
        return max(_relative(original(text)[0], wide(text)[0]) for text in (ids, fixed))


def _relative(got: Tensor, right: Tensor) -> float:
    size = float(right.double().norm())
    return float((got.double() - right.double()).norm()) / (size or 1.0) if right.numel() else 0.0


def _tokens(spec: Spec, shapes: list[tuple[int, int]], device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(spec.seed + len(shapes))
    return [torch.randint(0, VOCAB, shape, generator=generator).to(device) for shape in shapes]


@contextlib.contextmanager
def _declined() -> Iterator[set[str]]:
    """Names of the linears that the rewrite declines while graphs are compiled."""
    found: set[str] = set()
    real = _backend.rewrite

    def rewrite(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        found.update(declined.where for _, declined in result.declined)
        return result

    _backend.rewrite = rewrite
    try:
        yield found
    finally:
        _backend.rewrite = real


@contextlib.contextmanager
def _without_inductor(*, enabled: bool) -> Iterator[None]:
    """The backend without Inductor: rewritten graphs run as they are."""
    import importlib

    module = importlib.import_module("torch._inductor.compile_fx")
    real = module.compile_fx
    if enabled:
        module.compile_fx = lambda gm, inputs, **_: gm.forward  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.compile_fx = real  # type: ignore[attr-defined]
