"""The cut behind an activated gate, as CATS does (COLM 2024): neurons of up and down are skipped, and the gate has an adapter.

    neuron i of this token   where act(gate)_i^2 worth_i >= 2 price (inputs of up + outputs of down)

worth_i = n_i E[u_i^2]: dropping the hidden value h_i = act(gate)_i u_i costs half of h_i^2 n_i, but the mask is made before up is
multiplied, so that only the size of u_i in general is known. The gate is what its own menu has at the price, dense included:
what it gets wrong of neurons that are dropped harms nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.recipes.builders import gated_adapter
from rana_fx.recipes.rana.builders import build
from rana_fx.recipes.rana.mlp_candidate import Acted, Cut, Rows
from rana_fx.recipes.rana.operating_point import Point, Unit


class GatedCut(Cut):
    """Kind "gated". ``worth_F``: see above."""

    at_gate = 0.7  # a unit of cost there has to save less, since its error also moves masks

    def squares(self, rows: Rows) -> Tensor:
        return self._active(rows.ups[self.of.block.gate]).square()

    def worth(self, rows: Rows) -> Tensor:
        squares_TF = self.squares(rows)
        # where the gate is zero nothing is known of up, and nothing needs to be
        sizes_TF = torch.where(squares_TF > 0, rows.hidden_TF.square() / squares_TF, 0.0)
        sizes_F = sizes_TF.sum(0) / (squares_TF > 0).sum(0).clamp_min(1)
        return sizes_F * self.norms_F

    def act(self, rows: Rows, gate_TF: Tensor, price: float) -> Acted:
        # a neuron that is worth nothing is never needed
        tau_F = torch.where(self.worth_F > 0, 2 * price * self.row_cost() / self.worth_F, torch.inf)
        kept_TF = self._active(gate_TF).square() >= tau_F
        ups = list(rows.ups)
        ups[self.of.block.gate] = gate_TF
        return Acted(self.of.block.pointwise(*ups).float() * kept_TF, float(kept_TF.count_nonzero()) / len(kept_TF), tau_F)

    def row_cost(self) -> float:
        return self.up_cost + self.down_cost

    def adapters(self, unit: Unit, point: Point) -> list[Adapter]:
        if unit == self.of.lead:
            found, bias_O = self.acted(point)
            return [gated_adapter(self.problem, self.of.block, found.tau_F, point.kept, bias_O)]
        return [] if point.gate is None else build(self.problem, (self.of.gate,), self.gate, point.gate)

    def _active(self, gate_TF: Tensor) -> Tensor:
        assert self.of.block.activation is not None
        return self.of.block.activation(gate_TF).float()
