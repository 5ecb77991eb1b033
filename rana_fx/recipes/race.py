"""Choose among splits of an MLP's budget by the error of the MLP's output (RaNA Algorithm 2).

In: candidate splits with their ranks and thresholds, and sampled rows of the MLP's input. Out: the candidate with the
least squared error, and that error relative to the output's energy. Every candidate is scored on the first 4096 rows;
on the rest only those that can still win, judged by the paired difference to the leader, so the answer is that of
scoring all on all rows at a fraction of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.decompose import Basis, Choice
from rana_fx.layout import MlpBlock
from rana_fx.recipes.problem import Problem

_FIRST = 4096  # rows on which every candidate is scored
_CHUNK = 1024
_SIGMAS = 6.0  # a candidate is dropped when its mean error is this many standard errors above the leader's
_MARGIN = 0.02  # and at least this much, relatively


@dataclass(frozen=True)
class Candidate:
    """``split``: multiples of the common fraction, in the order of the block's sites; ``threshold``: squared, of down."""

    split: tuple[float, ...]
    choices: tuple[Choice, ...]
    threshold: float


def race(
    problem: Problem, block: MlpBlock, bases: list[Basis], norms_F: Tensor, candidates: list[Candidate], rows_TI: Tensor
) -> tuple[Candidate, float]:
    """The winner and its relative error ||y^ - y||^2 / ||y||^2 (biases of down left out)."""
    order = torch.randperm(len(rows_TI), generator=torch.Generator().manual_seed(0)).to(rows_TI.device)
    down_FO = problem.matrix((block.down,)).t().contiguous()
    uppers = [(problem.matrix((up,)), problem.bias((up,))) for up in block.ups]
    alive = list(range(len(candidates)))
    errors: list[list[Tensor]] = [[] for _ in candidates]
    energy = 0.0
    for start in range(0, len(rows_TI), _CHUNK):
        x_TI = rows_TI[order[start : start + _CHUNK]].float()
        dense = block.pointwise(*(torch.nn.functional.linear(x_TI, w, b) for w, b in uppers)).float()
        energy += float((dense @ down_FO).square().sum(dtype=torch.float64))
        outs = _outputs(bases, [b for _, b in uppers], [candidates[i] for i in alive], x_TI)
        for index in alive:
            candidate = candidates[index]
            hidden = block.pointwise(*(outs[j, c] for j, c in enumerate(candidate.choices))).float()
            kept = (hidden * norms_F).square_() >= candidate.threshold
            delta = (hidden * kept - dense) @ down_FO
            errors[index].append(delta.square_().sum(1).double())
        done = start + len(x_TI)
        if len(alive) > 1 and done >= _FIRST and done < len(rows_TI):
            alive = _survivors({index: torch.cat(errors[index]) for index in alive})
    totals = {index: float(torch.cat(errors[index]).sum()) for index in alive}
    best = min(totals, key=totals.__getitem__)
    return candidates[best], totals[best] / max(energy, 1e-30)


def _outputs(
    bases: list[Basis], biases: list[Tensor | None], candidates: list[Candidate], x_TI: Tensor
) -> dict[tuple[int, Choice], Tensor]:
    """Every up's adapted output for every choice that occurs; z is shared by the choices of one up."""
    outs: dict[tuple[int, Choice], Tensor] = {}
    for j, (basis, bias) in enumerate(zip(bases, biases, strict=True)):
        choices = {candidate.choices[j] for candidate in candidates}
        widest = max(choice.rank for choice in choices)
        z_TD = x_TI @ basis.b_DI[:widest].t()
        for choice in choices:
            z = z_TD[:, : choice.rank]
            masked = z * (z.square() >= choice.threshold)
            outs[j, choice] = torch.nn.functional.linear(masked, basis.a_OD[:, : choice.rank], bias)
    return outs


def _survivors(errors: dict[int, Tensor]) -> list[int]:
    leader = min(errors, key=lambda index: float(errors[index].sum()))
    least = float(errors[leader].mean())
    kept = []
    for index, values in errors.items():
        difference = values - errors[leader]
        gap = float(difference.mean())
        noise = float(difference.std()) / len(difference) ** 0.5
        if index == leader or gap < _SIGMAS * noise or gap < _MARGIN * least:
            kept.append(index)
    return kept
