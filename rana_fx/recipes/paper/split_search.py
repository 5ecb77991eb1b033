"""Choose among splits of an MLP's budget by the error of the MLP's output (RaNA Algorithm 2).

In: candidate splits with their ranks and thresholds, and sampled rows of the MLP's input. Out: the candidate with the
least squared error, and that error relative to the output's energy, by successive elimination: rows of the most energy, which
may decide the sum alone, are scored first and by every candidate; the rest in random order, where candidates are eliminated by
the paired difference to the leader. The result is that of scoring all candidates on all rows, in a fraction of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.calibration.layout import MlpBlock
from rana_fx.recipes.basis import Basis, RankThreshold
from rana_fx.recipes.problem import Problem

_HEAVY = 256  # rows of the largest energy, a stratum of its own, which no sample represents
_CHUNK = 512
_FIRST = 1024  # random rows scored before the first elimination
_SIGMAS = 6.0  # a candidate is eliminated when its error is this many standard errors above the leader's
_MARGIN = 0.01  # and at least this much, relatively


@dataclass(frozen=True)
class SplitCandidate:
    """``split``: multiples of the common fraction, in the order of the block's sites. ``ups``: rank and threshold of each up.

    ``threshold``: of down, on squared importance.
    """

    split: tuple[float, ...]
    ups: tuple[RankThreshold, ...]
    threshold: float


def successive_elimination(
    problem: Problem,
    block: MlpBlock,
    bases: list[Basis],
    norms_F: Tensor,
    candidates: list[SplitCandidate],
    rows_TI: Tensor,
    hidden_TF: Tensor,
) -> tuple[SplitCandidate, float]:
    """The best candidate and its relative error ||y^ - y||^2 / ||y||^2 (biases of down left out).

    ``hidden_TF``: the dense model's input of down for ``rows_TI``, fp32.
    """
    rows = len(rows_TI)
    order, heavy = _order(hidden_TF, norms_F)
    down_FO = problem.matrix((block.down,)).t().contiguous()
    biases = [problem.bias((up,)) for up in block.ups]
    alive = list(range(len(candidates)))
    errors: list[list[Tensor]] = [[] for _ in candidates]
    energy = 0.0
    starts = [*range(0, heavy, _CHUNK), *range(heavy, rows, _CHUNK)]
    for start, done in zip(starts, [*starts[1:], rows], strict=True):
        chosen = order[start:done]
        x_TI, dense = rows_TI[chosen].float(), hidden_TF[chosen]
        energy += float((dense @ down_FO).square_().sum(dtype=torch.float64))
        outs = _outputs(bases, biases, [candidates[i] for i in alive], x_TI)
        for index in alive:
            candidate = candidates[index]
            hidden = block.pointwise(*(outs[j, c] for j, c in enumerate(candidate.ups))).float()
            kept = (hidden * norms_F).square_() >= candidate.threshold
            delta = (hidden * kept).sub_(dense) @ down_FO
            errors[index].append(delta.square_().sum(1).double())
        if len(alive) > 1 and heavy + _FIRST <= done < rows:
            alive = _survivors({index: torch.cat(errors[index]) for index in alive}, heavy, rows)
    totals = {index: float(torch.cat(errors[index]).sum()) for index in alive}
    best = min(totals, key=totals.__getitem__)
    return candidates[best], totals[best] / max(energy, 1e-30)


def _order(hidden_TF: Tensor, norms_F: Tensor) -> tuple[Tensor, int]:
    """Rows in the order of scoring, and how many of them come first for their energy."""
    weights_T = torch.cat([(chunk * norms_F).square_().sum(1) for chunk in hidden_TF.split(_CHUNK)])
    heavy = min(_HEAVY, len(weights_T))
    first = weights_T.topk(heavy).indices
    order = torch.randperm(len(weights_T), generator=torch.Generator().manual_seed(0), device="cpu").to(first.device)
    rest = torch.ones(len(weights_T), dtype=torch.bool, device=first.device)
    rest[first] = False
    return torch.cat([first, order[rest[order]]]), heavy


def _outputs(
    bases: list[Basis], biases: list[Tensor | None], candidates: list[SplitCandidate], x_TI: Tensor
) -> dict[tuple[int, RankThreshold], Tensor]:
    """Every up's adapted output for every rank and threshold that occurs; z = B x is shared by those of one up."""
    outs: dict[tuple[int, RankThreshold], Tensor] = {}
    for j, (basis, bias) in enumerate(zip(bases, biases, strict=True)):
        choices = {candidate.ups[j] for candidate in candidates}
        widest = max(choice.rank for choice in choices)
        z_TD = x_TI @ basis.b_DI[:widest].t()
        for choice in choices:
            z = z_TD[:, : choice.rank]
            masked = z * (z.square() >= choice.threshold)
            outs[j, choice] = torch.nn.functional.linear(masked, basis.a_OD[:, : choice.rank], bias)
    return outs


def _survivors(errors: dict[int, Tensor], heavy: int, rows: int) -> list[int]:
    """Candidates that may still have the least error over all ``rows``, from those scored so far, ``heavy`` ones first."""
    scored = len(next(iter(errors.values())))
    rest, seen = rows - heavy, scored - heavy

    def expected(values: Tensor) -> float:
        return float(values[:heavy].sum()) + rest * float(values[heavy:].mean())

    leader = min(errors, key=lambda index: expected(errors[index]))
    least = expected(errors[leader])
    kept = []
    for index, values in errors.items():
        difference = values - errors[leader]
        gap = expected(difference)
        # of a sample drawn without replacement
        noise = rest * float(difference[heavy:].std()) * ((1 / seen) * (1 - seen / rest)) ** 0.5
        if index == leader or gap < _SIGMAS * noise or gap < _MARGIN * least:
            kept.append(index)
    return kept
