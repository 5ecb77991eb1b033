"""Number of components an input needs: the paper's Figs. 2a and 2b.

In: a calibrated model and a problem with held-out rows. Out: rows of kind ``rank_need``: the fraction of components that hold 90
or 99 % of a token's energy, in the rank basis of a linear and, for ``down``, among the neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.common.calibrated import Calibrated
from rana_fx.recipes.basis import output_basis, second_moment
from rana_fx.recipes.problem import Problem

QUANTILES = (0.1, 0.5, 0.9)
_SHARES = (0.9, 0.99)
_ROWS = 1024  # at a time


def rank_needs(calibrated: Calibrated, held_out: Problem) -> list[dict[str, Any]]:
    """Rows for attention inputs and up projections in their rank basis, and for down among its neurons."""
    layout = calibrated.layout
    problem = calibrated.problem(budget=1.0, metric="flops", recipe="paper")
    stacks = [("attention_in", stack) for stack in layout.stacks()]
    ups = [("up", (up,)) for block in layout.blocks for up in block.ups]
    found = []
    for role, names in (*stacks, *ups):
        basis = output_basis(problem.matrix(names), second_moment(problem.rows(names[0])))
        chunks = held_out.rows(names[0]).float().split(_ROWS)
        found += _need(role, "+".join(names), "rank", [(chunk @ basis.b_DI.t()).square() for chunk in chunks])
    for block in layout.blocks:
        norms = torch.linalg.vector_norm(problem.matrix((block.down,)), dim=0)
        chunks = held_out.rows(block.down).float().split(_ROWS)
        found += _need("down", block.down, "neuron", [(chunk * norms).square() for chunk in chunks])
    return found


def _need(role: str, site: str, basis: str, energies: list[Tensor]) -> list[dict[str, Any]]:
    found = []
    for share in _SHARES:
        needed = []
        for energy_TD in energies:
            above = energy_TD.double().sort(dim=1, descending=True).values.cumsum(1)
            counts = (above < share * above[:, -1:]).sum(1) + 1
            needed.append(counts.double() / energy_TD.shape[1])
        fractions = torch.cat(needed).cpu()
        quantiles = torch.quantile(fractions, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        names = [f"q{round(100 * q)}" for q in QUANTILES]
        facts = {"kind": "rank_need", "role": role, "site": site, "basis": basis, "energy": share}
        found.append(facts | {"mean": float(fractions.mean())} | dict(zip(names, quantiles, strict=True)))
    return found
