"""An independent fp64 implementation of the published algorithms, the reference of recipe ``paper``.

In: weights, captured inputs of the dense model and a target fraction. Out: rank, threshold and kept components of every
linear, the split of an MLP's budget, and hooks that mask a model's linears. Thresholds come from sorting every score,
bases from an SVD of the outputs, and every split is scored on every token: slow but simple.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Rank:
    """y = A (m * z) + b with z = B x and m = [z^2 >= threshold]: A (out, r), B (r, in), both fp64."""

    a: Tensor
    b: Tensor
    threshold: float
    kept: float
    coverage: float

    @property
    def rank(self) -> int:
        return len(self.b)

    def scores(self, x: Tensor) -> Tensor:
        return (x @ self.b.t()).square()

    def output(self, x: Tensor, threshold: float | None = None) -> Tensor:
        """A (m * z) without the bias; another threshold may be given."""
        z = x @ self.b.t()
        return (z * (z.square() >= (self.threshold if threshold is None else threshold))) @ self.a.t()


@dataclass(frozen=True, eq=False)
class Neuron:
    """Input j is kept iff |h_j| |W_:,j| >= threshold. ``fraction``: of all inputs, on average."""

    weight: Tensor
    threshold: float
    fraction: float

    def scores(self, h: Tensor) -> Tensor:
        return h.abs() * self.weight.norm(dim=0)

    def output(self, h: Tensor, threshold: float | None = None) -> Tensor:
        kept = self.scores(h) >= (self.threshold if threshold is None else threshold)
        return (h * kept) @ self.weight.t()


def largest(scores: Tensor, count: int) -> tuple[float, float]:
    """The smallest of the ``count`` largest scores, and the sum of those."""
    ordered = scores.flatten().sort(descending=True).values[:count]
    return float(ordered[-1]), float(ordered.sum())


def rank_adapter(weight: Tensor, x: Tensor, fraction: float) -> Rank | None:
    """Line search over the static rank for a cost of ``fraction`` of the dense linear; None when no rank is feasible."""
    out, width = weight.shape
    u = torch.linalg.svd(weight @ x.t(), full_matrices=False).U[:, : min(out, width)]
    b = u.t() @ weight
    scores = (x @ b.t()).square()
    total = float(scores.sum())
    best: Rank | None = None
    for rank in range(min(out, width), 0, -10):
        kept = (fraction * out * width - width * rank) / out
        count = int(len(x) * kept)
        if not 0 < kept < rank or count == 0:
            continue
        threshold, energy = largest(scores[:, :rank], count)
        if best is None or energy / total > best.coverage:
            best = Rank(u[:, :rank], b[:rank], threshold, kept, energy / total)
    return best


def neuron_adapter(weight: Tensor, h: Tensor, fraction: float) -> Neuron:
    """Threshold at the quantile that keeps ``fraction`` of all inputs."""
    scores = h.abs() * weight.norm(dim=0)
    return Neuron(weight, largest(scores, round(scores.numel() * fraction))[0], fraction)


def grid(linears: int) -> list[tuple[float, ...]]:
    """Shares of each linear, 3 .. 9 parts of 6 per linear, that add up to one."""
    parts = itertools.product(range(3, 10), repeat=linears)
    return [tuple(part / (6 * linears) for part in chosen) for chosen in parts if sum(chosen) == 6 * linears]


@dataclass(frozen=True, eq=False)
class Mlp:
    """The best split: ``shares`` of the linears in order (ups first, down last), their adapters, and all splits' errors."""

    shares: tuple[float, ...]
    ups: tuple[Rank, ...]
    down: Neuron
    errors: dict[tuple[float, ...], float]


def mlp(
    ups: list[Tensor], biases: list[Tensor | None], down: Tensor, act: Callable[..., Tensor], x: Tensor, fraction: float
) -> Mlp:
    """Split ``fraction`` of the MLP's cost over its (equally large) linears by the squared error of its output."""
    linears = len(ups) + 1
    plus = [0.0 if bias is None else bias for bias in biases]
    hidden = act(*(x @ w.t() + b for w, b in zip(ups, plus, strict=True)))
    dense = hidden @ down.t()
    found: dict[tuple[float, ...], tuple[tuple[Rank, ...], Neuron]] = {}
    errors: dict[tuple[float, ...], float] = {}
    ranks: dict[tuple[int, float], Rank | None] = {}
    for shares in grid(linears):
        own = [linears * fraction * share for share in shares]
        for key in enumerate(own[:-1]):
            if key not in ranks:
                ranks[key] = rank_adapter(ups[key[0]], x, key[1])
        chosen = [ranks[key] for key in enumerate(own[:-1])]
        if own[-1] > 1 or any(choice is None for choice in chosen):
            continue
        feasible = tuple(choice for choice in chosen if choice is not None)
        neuron = neuron_adapter(down, hidden, own[-1])
        masked = act(*(choice.output(x) + b for choice, b in zip(feasible, plus, strict=True)))
        found[shares] = feasible, neuron
        errors[shares] = float((neuron.output(masked) - dense).square().sum())
    best = min(errors, key=errors.__getitem__)
    return Mlp(best, *found[best], errors)


def inputs(model: nn.Module, names: Iterable[str], batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Inputs of the named linears of the dense model over all batches: (tokens, in), fp64."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def capture(name: str) -> Callable[..., None]:
        return lambda _, args: rows[name].append(args[0].flatten(0, -2).double())

    hooks = [model.get_submodule(name).register_forward_pre_hook(capture(name)) for name in rows]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@contextmanager
def masked(model: nn.Module, outputs: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, the output of each named linear is its function of the input plus the bias."""

    def replace(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            bias = module.bias
            return function(args[0]) + (0.0 if bias is None else bias)  # type: ignore[operator]

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(replace(function)) for name, function in outputs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
