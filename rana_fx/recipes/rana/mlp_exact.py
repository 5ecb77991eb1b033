"""The cut where there is no gate: up is approximated by components, and rows of it that matter to a token are computed exactly.

    row i of up, of this token   where the approximation y_i >= theta_i
    neuron i, for down           where h_i^2 n_i >= 2 price (outputs of down), h made of the corrected y

theta_i is what pays best on the block's rows: of all tokens with larger y_i, the loss that exact values save, over what reading
a row costs. Activations are flat below zero, where an approximation does, and steep above, where it does not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.recipes.builders import neuron_adapter
from rana_fx.recipes.rana.builders import build
from rana_fx.recipes.rana.candidates import OF_BASIS
from rana_fx.recipes.rana.mlp_candidate import Acted, Cut, Rows
from rana_fx.recipes.rana.operating_point import Point, Unit

_ALIKE = 1e-5  # of an output's largest value


class ExactCut(Cut):
    """Kind "exact"."""

    kinds = OF_BASIS

    def squares(self, rows: Rows) -> Tensor:
        return rows.hidden_TF.square()

    def worth(self, rows: Rows) -> Tensor:  # noqa: ARG002
        return self.norms_F

    def act(self, rows: Rows, gate_TF: Tensor, price: float) -> Acted:
        theta_F = self._thresholds(rows, gate_TF, price)
        exact_TF = gate_TF >= theta_F
        hidden_TF = self.of.block.pointwise(torch.where(exact_TF, rows.ups[0], gate_TF)).float()
        kept_TF = hidden_TF.square() * self.norms_F >= 2 * price * self.row_cost()
        tokens = len(kept_TF)
        kept, exact = (float(mask_TF.count_nonzero()) / tokens for mask_TF in (kept_TF, exact_TF))
        return Acted(hidden_TF * kept_TF, kept, theta_F, exact)

    def row_cost(self) -> float:
        return self.down_cost

    def adapters(self, unit: Unit, point: Point) -> list[Adapter]:
        found, bias_O = self.acted(point)
        if unit == self.of.lead:
            bar = 2 * point.charged * self.row_cost()
            made = neuron_adapter(self.problem, self.of.down, bar, self.norms_F.sqrt(), point.kept / self.width)
            return [replace(made, bias=bias_O)]
        assert point.gate is not None
        return [
            replace(made, exact_tau=found.tau_F, exact_kept=found.exact).costed()
            for made in build(self.problem, unit, self.gate, point.gate)
        ]

    def _thresholds(self, rows: Rows, gate_TF: Tensor, price: float) -> Tensor:
        """theta_F, between two of the block's values, which other roundings may not tell apart; +inf where no row pays."""
        without_TF = self._paid(rows, self.of.block.pointwise(gate_TF).float(), price)
        saved_TF = without_TF - self._paid(rows, rows.hidden_TF, price) - price * self.up_cost
        values_TF, order_TF = gate_TF.sort(0, descending=True)
        next_TF = torch.cat([values_TF[1:], torch.full_like(values_TF[:1], -torch.inf)])
        # tokens of one value, as far as roundings tell, are exact together or not at all
        alike_TF = values_TF - next_TF <= _ALIKE * values_TF.abs().amax(0)
        sums_TF = saved_TF.gather(0, order_TF).cumsum(0).masked_fill(alike_TF, -torch.inf)
        best_F, at_F = sums_TF.max(0)
        theta_F = ((values_TF + next_TF) / 2).gather(0, at_F[None])[0]
        return torch.where(best_F > 0, theta_F, torch.inf)

    def _paid(self, rows: Rows, hidden_TF: Tensor, price: float) -> Tensor:
        """What each neuron loses and costs down, for given hidden values."""
        kept_TF = hidden_TF.square() * self.norms_F >= 2 * price * self.down_cost
        lost_TF = (rows.hidden_TF - hidden_TF * kept_TF).square() * self.norms_F / 2
        return lost_TF + price * self.down_cost * kept_TF
