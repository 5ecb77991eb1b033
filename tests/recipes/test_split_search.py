"""Successive elimination of splits finds the best split of an exhaustive search, also if a few tokens have most energy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rana_fx.calibration.calibrate import calibrate
from rana_fx.recipes.basis import output_basis, second_moment
from rana_fx.recipes.importance import importance_profile
from rana_fx.recipes.mlp_rows import hidden_rows
from rana_fx.recipes.paper import recipe as paper
from rana_fx.recipes.paper.line_search import energies
from rana_fx.recipes.paper.split_search import successive_elimination
from rana_fx.recipes.problem import Problem

WIDTH, FFN, TOKENS = 24, 40, 6000


class Mlp(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, FFN) if gated else None
        self.up, self.down = nn.Linear(WIDTH, FFN, bias=not gated), nn.Linear(FFN, WIDTH)

    def forward(self, x):
        h = nn.functional.gelu(self.up(x)) if self.gate is None else nn.functional.silu(self.gate(x)) * self.up(x)
        return x + self.down(h)


def inputs(tail: str) -> torch.Tensor:
    x = torch.randn(TOKENS, WIDTH) * torch.logspace(0, -1.5, WIDTH)
    if tail == "heavy":  # as the first token of every sequence in a large model: a hundredth of the tokens, most of the energy
        x[torch.randperm(TOKENS)[: TOKENS // 100]] = torch.randn(WIDTH) * 30 + torch.randn(TOKENS // 100, WIDTH)
    return x


@pytest.mark.parametrize("tail", ["light", "heavy"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("fraction", [0.4, 0.6])
def test_the_winner_is_that_of_scoring_all_on_all(gated, tail, fraction):
    model = Mlp(gated)
    found = calibrate(model, [inputs(tail)], wanted=lambda layout: {group.sites for group in layout.groups}, progress=False)
    problem = Problem(found.layout, found.samples, fraction, "flops", "paper", False)
    (block,) = found.layout.blocks
    rows = problem.rows(block.ups[0])
    bases = [output_basis(problem.matrix((up,)), second_moment(rows)) for up in block.ups]
    norms = torch.linalg.vector_norm(problem.matrix((block.down,)), dim=0)
    hidden = hidden_rows(problem, block, rows)
    measured = [energies(basis.b_DI, rows, step=1) for basis in bases]
    candidates = paper._candidates(problem, block, measured, importance_profile(hidden, norms), fraction)
    assert len(candidates) > 3

    scored = []
    watched = replace(block, pointwise=lambda *outs: scored.append(len(outs[0])) or block.pointwise(*outs))
    best, error = successive_elimination(problem, watched, bases, norms, candidates, rows, hidden)
    assert sum(scored) < 0.6 * len(candidates) * TOKENS, "no candidate was eliminated, so nothing is tested"

    down = problem.matrix((block.down,))
    errors = []
    for candidate in candidates:
        outs = []
        for up, basis, choice in zip(block.ups, bases, candidate.ups, strict=True):
            z = rows @ basis.b_DI[: choice.rank].t()
            masked = z * (z.square() >= choice.threshold)
            out = masked @ basis.a_OD[:, : choice.rank].t()
            outs.append(out if problem.bias((up,)) is None else out + problem.bias((up,)))
        h = block.pointwise(*outs)
        delta = (h * ((h * norms).square() >= candidate.threshold) - hidden) @ down.t()
        errors.append(float(delta.double().square().sum()))
    assert best == candidates[errors.index(min(errors))]
    assert error == pytest.approx(min(errors) / float((hidden @ down.t()).double().square().sum()), rel=1e-5)
