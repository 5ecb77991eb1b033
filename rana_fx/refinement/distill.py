"""The training of a refinement: Adam on the divergence from the dense model, and a judge that knows no text of it.

In: an instrumented model, adapters, pieces of text to train on and others to judge on. Out: adapters that move the model's output
less on the latter and cost no more there; or None, with the reason. Adapters run as the simulator runs them
(rana_fx/recipes/simulate.py), so models, batches and outputs may be of any kind, and nothing is compiled. Masks are constants in
the backward pass; at each judgement all thresholds are scaled by one number, with which the adapters cost what they did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rana_fx.adapter import Adapter
from rana_fx.calibration.autocast import autocast_as
from rana_fx.calibration.instrumented import InstrumentedModel
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.sensitivity import compared, divergence, floating, logits_of, real_outputs, rows_of
from rana_fx.cost import Kept
from rana_fx.progress import Progress
from rana_fx.recipes.intervals import mean_interval
from rana_fx.recipes.simulate import AdapterSimulator
from rana_fx.refinement.parameters import Trained
from rana_fx.refinement.settings import Refine
from rana_fx.refinement.text import tokens_of

COST_RISES = 0.005  # the most by which the measured cost may rise, of itself
_CLOSE = 0.002  # of the cost: thresholds are scaled until it is so near to what it was
_SCALINGS = 3
_JUDGED = 2  # times, evenly; the best one is kept
_WARMUP = 0.1  # of the steps
_CLIP = 1.0
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, eq=False)
class Judged:
    """Adapters, and what they did on the held-out rows.

    kept: by adapter, per token. cost: per token, in the plan's metric, of all adapters. sums, tokens: divergence and tokens of
    each row, fp64.
    """

    adapters: Sequence[Adapter]
    kept: dict[str, Kept]
    cost: float
    sums: Tensor
    tokens: Tensor

    @property
    def divergence(self) -> float:
        """Per token."""
        return float(self.sums.sum() / self.tokens.sum())

    def is_better_than(self, other: Judged) -> bool:
        """Whether it diverges less on text of the kind, at 95 % confidence over rows."""
        return mean_interval(self.sums - other.sums, self.tokens).high < 0


class Judge:
    """Simulates adapters on held-out pieces."""

    def __init__(self, model: InstrumentedModel, layout: Layout, held: Sequence[Any], metric: str) -> None:
        self._model, self._layout, self._held, self._metric = model, layout, held, metric
        with torch.no_grad(), autocast_as(()):
            self._dense = [compared(model.run(piece)) for piece in held]

    @torch.no_grad()
    def of(self, adapters: Sequence[Adapter]) -> Judged:
        """The adapters as they are."""
        simulator = AdapterSimulator(self._model, self._layout, adapters)
        found = []
        for row, dense in zip(self._held, self._dense, strict=True):
            with autocast_as(()):
                output = self._model.run(row, simulator.step)
            simulator.clear()
            found.append(divergence(output, dense, self._model))
        sums, tokens = torch.tensor(found, dtype=torch.float64, device="cpu").t()
        kept = simulator.kept()
        cost = sum(adapter.cost(kept[adapter.name])[self._metric] for adapter in adapters if adapter.name in kept)
        return Judged(adapters, kept, cost, sums, tokens)

    def at_cost(self, adapters: Sequence[Adapter], cost: float) -> Judged:
        """With their thresholds scaled by the number at which they cost so much, or a little less."""
        found, scale, slope = self.of(adapters), 1.0, -0.5
        for _ in range(_SCALINGS):
            ratio = found.cost / cost
            if not math.isfinite(found.divergence) or 1 - _CLOSE <= ratio <= 1 + _CLOSE:
                break
            # the cost is nearly linear in the logarithm of thresholds: the secant through the last two
            step = max(-1.0, min(1.0, -math.log(ratio) / slope))
            tried = self.of(_scaled(adapters, scale * math.exp(step)))
            change = (math.log(tried.cost) - math.log(found.cost)) / step
            scale, found, slope = scale * math.exp(step), tried, min(change, -0.05)
        return found


def distilled(
    model: InstrumentedModel,
    layout: Layout,
    adapters: Sequence[Adapter],
    pieces: Sequence[Any],
    judge: Judge,
    *,
    before: Judged,
    refine: Refine,
    seed: int,
    steps: Progress,
) -> tuple[Judged | None, int, str]:
    """(the best that was found, or None; tokens trained on; why the training ended early or nothing was found, or "")."""
    trained = Trained(layout, adapters)
    schedule = _Schedule(refine, pieces, seed)
    optimizer = torch.optim.Adam(trained.parameters(), lr=refine.rate, betas=_BETAS)
    best, lowest, reason = before, math.inf, ""
    steps.expect(schedule.steps)
    step = tokens = told = 0
    while step < schedule.steps:
        piece = schedule.piece(step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        reason = _step(model, layout, trained, piece, optimizer)
        if reason:
            break
        step, tokens = step + 1, tokens + tokens_of(piece)
        schedule.shorten(step)
        steps.expect(schedule.steps)
        steps.advance()
        if step * _JUDGED // schedule.steps > told or step == schedule.steps:
            told = step * _JUDGED // schedule.steps
            found = judge.at_cost(trained.stored(), before.cost)
            if not math.isfinite(found.divergence):
                reason = f"after {step} steps the output is not finite"
                break
            if found.cost > before.cost * (1 + COST_RISES):
                continue
            if found.divergence < best.divergence and found.is_better_than(before):
                best = found
            lowest = min(lowest, found.divergence)
    if best is before:
        missed = "it cost more" if math.isinf(lowest) else f"{lowest:.4f} was the lowest, {before.divergence:.4f} before"
        return None, tokens, reason or missed
    return best, tokens, reason


def _step(model: InstrumentedModel, layout: Layout, trained: Trained, piece: Any, optimizer: torch.optim.Optimizer) -> str:
    """One step of the optimizer; returns why it was not made."""
    with torch.no_grad():
        dense = compared(model.run(piece))
    with torch.inference_mode(False), torch.enable_grad(), autocast_as(()):
        output = model.run(piece, AdapterSimulator(model, layout, trained.adapters()).step)
        loss = loss_of(output, dense, model)
        if not loss.requires_grad:
            return "the model's output does not depend on its linears by differentiable operations"
        loss.backward()
    norm = nn.utils.clip_grad_norm_(trained.parameters(), _CLIP)
    if not bool(torch.isfinite(loss.detach() + norm)):
        return "the loss or its gradients are not finite"
    optimizer.step()
    optimizer.zero_grad()
    return ""


class _Schedule:
    """Which piece each step trains on, and how fast: a warm-up, then half a cosine to zero at the last step."""

    def __init__(self, refine: Refine, pieces: Sequence[Any], seed: int) -> None:
        self._refine, self._pieces = refine, pieces
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []
        self._started = time.perf_counter()
        mean = sum(map(tokens_of, pieces)) / len(pieces)
        self.steps = max(1, round(refine.tokens / mean))

    def piece(self, step: int) -> Any:
        """All pieces come before one comes again."""
        while len(self._order) <= step:
            self._order += torch.randperm(len(self._pieces), generator=self._generator).tolist()
        return self._pieces[self._order[step]]

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = max(1, math.ceil(_WARMUP * self.steps))
        if step < rising:
            return self._refine.rate * (step + 1) / rising
        return self._refine.rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))

    def shorten(self, done: int) -> None:
        """As many steps as the minutes allow, by the mean time of those done."""
        if self._refine.minutes is not None:
            seconds = time.perf_counter() - self._started
            self.steps = max(done, min(self.steps, int(60 * self._refine.minutes * done / seconds)))


def loss_of(output: Any, dense: Any, model: InstrumentedModel) -> Tensor:
    """As ``calibration.sensitivity.divergence``, per row and with gradients."""
    logits, expected = logits_of(output), logits_of(dense)
    if logits is not None and expected is not None:
        log_q, log_p = (rows_of(values, model).float().log_softmax(-1) for values in (logits, expected))
        return nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(1, len(log_q))
    total = torch.zeros((), device=floating(output)[0].device)
    for tensor, reference in zip(floating(output), floating(dense), strict=True):
        wanted = real_outputs(reference, model).float()
        rows = (tensor.reshape(1, -1) if tensor.dim() == 1 else rows_of(tensor, model)).float()
        total = total + (rows - wanted).square().sum() / wanted.square().mean(0).sum().clamp_min(1e-30) / max(1, len(rows))
    return total


def _scaled(adapters: Sequence[Adapter], scale: float) -> list[Adapter]:
    """Thresholds of squares times a number; those of exact outputs stay, for they may have either sign."""
    made = []
    for adapter in adapters:
        router_tau = None if adapter.router_tau is None else adapter.router_tau * scale
        made.append(replace(adapter, tau=adapter.tau * scale, router_tau=router_tau))
    return made
