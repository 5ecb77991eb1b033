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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
CHANGE = 1e-7  # of weights, relative, in fp64: small, so that no value crosses a threshold that is NEAR away
Reference = Callable[[Oracle], tuple[Tensor, Cache]]  # what a call returns, by an oracle


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
    """Whether PyTorch raises an error on the model as it is, compiled or eager (torch.cond compiles itself)."""
    torch._dynamo.reset()
    model = build(spec).to(device)
    wide = copy.deepcopy(model).double()
    fast = torch.compile(model, backend="inductor" if lowered else "eager", dynamic=spec.dynamic or None)
    try:
        with warnings.catch_warnings(), torch.set_grad_enabled(spec.gradients):
            warnings.simplefilter("ignore")
            for ids in _tokens(spec, list(spec.calls), device):
                wide(ids)
                logits, _ = fast(ids)
                if spec.gradients:
                    _gradient(logits, model)
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
        if self.spec.cache == "none" or self.spec.attention == "none":
            return self._call(ids, None, None, lambda oracle: oracle.model(ids), gradients=gradients)[0]
        start, then = torch.tensor(0, device=ids.device), torch.tensor(ids.shape[1], device=ids.device)

        def prompt(oracle: Oracle) -> tuple[Tensor, Cache]:
            return oracle.model(ids, empty_cache(self.spec, len(ids), oracle.model.embed.weight), start)

        cache = empty_cache(self.spec, len(ids), self.original.embed.weight)
        outcome, kept = self._call(ids, cache, start, prompt, gradients=gradients)
        if outcome.kind == "right" and ids.shape[1] < 40:
            token = ids[:, :1]
            outcome, _ = self._call(token, kept, then, lambda oracle: oracle.model(token, prompt(oracle)[1], then))
        return outcome

    def _call(
        self, ids: Tensor, cache: Cache | None, start: Tensor | None, reference: Reference, *, gradients: bool = False
    ) -> tuple[Outcome, Cache]:
        if self.spec.prefill in ("dense", "cheapest"):
            # whether a call is dense depends on its tokens: each call is compiled, so that its declined linears are its own
            torch._dynamo.reset()
            self.declined.clear()
        got, kept = self.compiled(ids, cache, start)
        oracle = self._oracle()
        expected, _ = reference(oracle)
        outcome = self._compare(got.detach(), expected.detach(), oracle, reference)
        if outcome.kind == "right" and gradients:
            outcome = self._gradients(got, expected, oracle, reference)
        return outcome, kept

    def _oracle(self, change: float = 0.0) -> Oracle:
        return Oracle(self.original, self.plan, without=self.declined, change=change)

    def _compare(self, got: Tensor, expected: Tensor, oracle: Oracle, reference: Reference) -> Outcome:
        error, allowed = _relative(got, expected), _tolerance(self.spec)
        if error <= allowed:
            return Outcome("right")
        if oracle.margin < NEAR:
            return Outcome("near", f"{oracle.margin:.1e}")
        if self.spec.cache == "none" and self.plan.adapters:
            dense, _ = reference(Oracle(self.original, replace(self.plan, adapters=())))
            if _relative(got, dense.detach()) <= allowed:
                return Outcome("dense", f"relative distance to the plan {error:.2e}")
        with torch.no_grad():
            changed, _ = reference(self._oracle(CHANGE))
        allowed += self._amplified(changed, expected)
        return Outcome("right" if error <= allowed else "wrong", f"relative distance {error:.2e}, allowed {allowed:.1e}")

    def _gradients(self, got: Tensor, expected: Tensor, oracle: Oracle, reference: Reference) -> Outcome:
        """Compare the gradients of the embedding, which all layers reach."""
        mine, right = _gradient(got, self.model), _gradient(expected, oracle.model)
        error, allowed = _relative(mine, right), 30 * _tolerance(self.spec)
        if error > allowed:
            other = self._oracle(CHANGE)
            allowed += self._amplified(_gradient(reference(other)[0], other.model), right)
            allowed += 8 * self._dense_rounding(reference)
        return Outcome("right") if error <= allowed else Outcome("wrong", f"gradient off by {error:.2e}, allowed {allowed:.1e}")

    def _dense_rounding(self, reference: Reference) -> float:
        """Relative error of the gradient of the dense model in its own dtype, where the softmax of large values cancels."""
        dense = replace(self.plan, adapters=())
        narrow, wide = Oracle(self.original, dense), Oracle(self.original, dense)
        narrow.model.to(getattr(torch, self.spec.dtype))
        return _relative(*(_gradient(reference(oracle)[0], oracle.model) for oracle in (narrow, wide)))

    def _amplified(self, changed: Tensor, right: Tensor) -> float:
        """What the adapted model makes of the rounding of sums: the effect of a small change of each weight, in proportion.

        The rounding error of a sum of up to 66 products is, in the mean, that of changing each weight by 8 eps of its size.
        """
        return 8 * torch.finfo(getattr(torch, self.spec.dtype)).eps * _relative(changed, right) / CHANGE


def _gradient(logits: Tensor, model: Transformer) -> Tensor:
    """Of the mean square of the logits, for the embedding."""
    (logits if logits.dtype == torch.float64 else logits.float()).square().mean().backward()
    assert model.embed.weight.grad is not None
    return model.embed.weight.grad


def _tolerance(spec: Spec) -> float:
    """Bound of the relative error: about ten tensors per layer are rounded to their dtype; fp32 sums have up to 66 terms."""
    eps = torch.finfo(getattr(torch, spec.dtype)).eps
    return 64 * eps if spec.dtype == "float32" else 12 * eps * (10 * spec.layers) ** 0.5


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
