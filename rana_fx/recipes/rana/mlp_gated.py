"""The joint candidate behind an activated gate, as in CATS (COLM 2024): neurons of up and down are skipped, the gate is adapted.

    neuron i of this token   where act(gate)_i^2 importance_i >= 2 lambda (inputs of up + outputs of down)

importance_i = n_i E[u_i^2]: dropping the hidden value h_i = act(gate)_i u_i loses half of h_i^2 n_i, but the mask is made
before up is multiplied, so that only the mean square of u_i is known. The gate takes its own best candidate at the multiplier,
dense included: its error on dropped neurons does not affect the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.recipes.builders import gated_adapter
from rana_fx.recipes.rana.builders import build
from rana_fx.recipes.rana.mlp_candidate import AdaptedRows, MlpCandidate, MlpRows
from rana_fx.recipes.rana.operating_point import OperatingPoint
from rana_fx.recipes.rana.units import Unit


class GatedMlp(MlpCandidate):
    """Kind "gated"."""

    gate_discount = 0.7  # an error of the gate also perturbs the mask

    def squares(self, rows: MlpRows) -> Tensor:
        return self._active(rows.ups[self.mlp.block.gate]).square()

    def importance(self, rows: MlpRows) -> Tensor:
        squares_TF = self.squares(rows)
        # where the gate is zero, up is neither known nor needed
        sizes_TF = torch.where(squares_TF > 0, rows.hidden_TF.square() / squares_TF, 0.0)
        sizes_F = sizes_TF.sum(0) / (squares_TF > 0).sum(0).clamp_min(1)
        return sizes_F * self.norms_F

    def adapt(self, rows: MlpRows, gate_TF: Tensor, multiplier: float) -> AdaptedRows:
        # a neuron of zero importance is never needed
        tau_F = torch.where(self.importance_F > 0, 2 * multiplier * self.neuron_cost() / self.importance_F, torch.inf)
        kept_TF = self._active(gate_TF).square() >= tau_F
        ups = list(rows.ups)
        ups[self.mlp.block.gate] = gate_TF
        hidden_TF = self.mlp.block.pointwise(*ups).float() * kept_TF
        return AdaptedRows(hidden_TF, float(kept_TF.count_nonzero()) / len(kept_TF), tau_F)

    def neuron_cost(self) -> float:
        return self.up_cost + self.down_cost

    def adapters(self, unit: Unit, point: OperatingPoint) -> list[Adapter]:
        if unit == self.mlp.down_unit:
            found, bias_O = self.adapted(point)
            return [gated_adapter(self.problem, self.mlp.block, found.tau_F, point.kept, bias_O)]
        return [] if point.gate is None else build(self.problem, (self.mlp.gate,), self.gate, point.gate)

    def _active(self, gate_TF: Tensor) -> Tensor:
        assert self.mlp.block.activation is not None
        return self.mlp.block.activation(gate_TF).float()
