"""The joint candidate without a gate: up is approximated by components, and its rows that matter to a token are computed exactly.

    row i of up, of this token   where the approximation y_i >= theta_i
    neuron i, for down           where h_i^2 n_i >= 2 lambda (outputs of down), h made of the corrected y

theta_i minimises the Lagrangian on the block's rows: summed over all tokens with larger y_i, the loss that exact values save less
lambda times the cost of reading a row. Activations are flat below zero, where an approximation suffices, and steep above, where
it does not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.recipes.builders import neuron_adapter
from rana_fx.recipes.rana.builders import build
from rana_fx.recipes.rana.mlp_candidate import AdaptedRows, MlpCandidate, MlpRows
from rana_fx.recipes.rana.operating_point import BASIS_KINDS, OperatingPoint
from rana_fx.recipes.rana.units import Unit

_EQUAL = 1e-5  # of an output's largest value: closer values may be equal but for rounding


class ExactMlp(MlpCandidate):
    """Kind "exact"."""

    gate_kinds = BASIS_KINDS

    def squares(self, rows: MlpRows) -> Tensor:
        return rows.hidden_TF.square()

    def importance(self, rows: MlpRows) -> Tensor:  # noqa: ARG002
        return self.norms_F

    def adapt(self, rows: MlpRows, gate_TF: Tensor, multiplier: float) -> AdaptedRows:
        theta_F = self._thresholds(rows, gate_TF, multiplier)
        exact_TF = gate_TF >= theta_F
        hidden_TF = self.mlp.block.pointwise(torch.where(exact_TF, rows.ups[0], gate_TF)).float()
        kept_TF = hidden_TF.square() * self.norms_F >= 2 * multiplier * self.neuron_cost()
        tokens = len(kept_TF)
        kept, exact = (float(mask_TF.count_nonzero()) / tokens for mask_TF in (kept_TF, exact_TF))
        return AdaptedRows(hidden_TF * kept_TF, kept, theta_F, exact)

    def neuron_cost(self) -> float:
        return self.down_cost

    def adapters(self, unit: Unit, point: OperatingPoint) -> list[Adapter]:
        found, bias_O = self.adapted(point)
        if unit == self.mlp.down_unit:
            threshold, norms_F = 2 * point.joint_multiplier * self.neuron_cost(), self.norms_F.sqrt()
            made = neuron_adapter(self.problem, self.mlp.down, threshold, norms_F, point.kept / self.width)
            return [replace(made, bias=bias_O)]
        assert point.gate is not None
        return [
            replace(made, exact_tau=found.tau_F, exact_kept=found.exact).costed()
            for made in build(self.problem, unit, self.gate, point.gate)
        ]

    def _thresholds(self, rows: MlpRows, gate_TF: Tensor, multiplier: float) -> Tensor:
        """theta_F, between two values of a neuron that differ by more than rounding; +inf where no exact row lowers the sum."""
        without_TF = self._lagrangian(rows, self.mlp.block.pointwise(gate_TF).float(), multiplier)
        saved_TF = without_TF - self._lagrangian(rows, rows.hidden_TF, multiplier) - multiplier * self.up_cost
        values_TF, order_TF = gate_TF.sort(0, descending=True)
        next_TF = torch.cat([values_TF[1:], torch.full_like(values_TF[:1], -torch.inf)])
        # tokens of one value, but for rounding, are exact together or not at all
        equal_TF = values_TF - next_TF <= _EQUAL * values_TF.abs().amax(0)
        sums_TF = saved_TF.gather(0, order_TF).cumsum(0).masked_fill(equal_TF, -torch.inf)
        best_F, at_F = sums_TF.max(0)
        theta_F = ((values_TF + next_TF) / 2).gather(0, at_F[None])[0]
        return torch.where(best_F > 0, theta_F, torch.inf)

    def _lagrangian(self, rows: MlpRows, hidden_TF: Tensor, multiplier: float) -> Tensor:
        """Of each neuron and its column of down, (tokens, neurons), for given hidden values."""
        kept_TF = hidden_TF.square() * self.norms_F >= 2 * multiplier * self.down_cost
        lost_TF = (rows.hidden_TF - hidden_TF * kept_TF).square() * self.norms_F / 2
        return lost_TF + multiplier * self.down_cost * kept_TF
