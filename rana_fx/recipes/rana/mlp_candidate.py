"""A joint candidate of an MLP: its units are adapted together, since the output of one of them decides which neurons are kept.

In: an eligible block, rows of its input, candidates of its gate alone and the loss metric of its down projection. Out: cost and
loss of each of its units at any multiplier. The loss is measured at a few multipliers, by running the adapted block on the
rows: the change of hidden values, in down's loss metric, less its mean over tokens, which is added to down's bias at no cost.
Which neurons are kept, and how their values are computed, is decided by the kinds:

    gated   behind an activated gate, as CATS does: rows of up and columns of down (mlp_gated.py)
    exact   where there is no gate: rows of up beside an approximation of all of it (mlp_exact.py)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.apply import Target, apply
from rana_fx.calibration.score_histogram import Survival
from rana_fx.recipes.mlp_rows import up_outputs
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.builders import build
from rana_fx.recipes.rana.candidates import UnitCandidates
from rana_fx.recipes.rana.eligible_mlps import EligibleMlp
from rana_fx.recipes.rana.loss_metric import LossMetric
from rana_fx.recipes.rana.operating_point import OperatingPoint
from rana_fx.recipes.rana.units import Unit

# shares of neurons at which it is measured
_DROPPED = (0.02, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.78, 0.85, 0.91, 0.95, 0.98, 0.995)
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class MlpRows:
    """Rows of a block's input, (tokens, in), and of the dense model: outputs of its ups, and down's input, (tokens, neurons)."""

    x_TI: Tensor
    ups: list[Tensor]
    hidden_TF: Tensor


@dataclass(frozen=True, eq=False)
class AdaptedRows:
    """The adapted block on these rows: down's input, zero where a neuron is dropped, and means per token.

    ``kept``: neurons that down reads. ``exact``: rows of up beside its approximation. ``tau_F``: the thresholds that decide.
    """

    hidden_TF: Tensor
    kept: float
    tau_F: Tensor
    exact: float = 0.0


@dataclass(frozen=True)
class _Measured:
    """The joint candidate at one multiplier: the candidate of its gate (kind, format index), what is kept, and the loss."""

    log_multiplier: float
    gate: tuple[str, int]
    kept: float
    exact: float
    loss: float


class MlpCandidate(ABC):
    """The joint candidate of one block, measured on rows.

    Class attributes: ``gate_kinds``: candidates that the gate may take; None: all. ``gate_discount``: the gate's multiplier
    over the block's.

    Args:
        gate: candidates of the gate alone. rows_TI: of the block's input. metric: of down.
    """

    gate_kinds: Sequence[str] | None = None
    gate_discount = 1.0

    def __init__(self, problem: Problem, mlp: EligibleMlp, gate: UnitCandidates, rows_TI: Tensor, metric: LossMetric) -> None:
        self.mlp, self.gate = mlp, gate
        self.problem, self.norms_F = problem, metric.norms_I
        self.width = problem.layout.sites[mlp.down].in_features
        self.up_cost, self.down_cost = (problem.size((name,)) / self.width for name in (mlp.up, mlp.down))
        self._rows_TI = rows_TI
        self._latest: tuple[tuple[float, OperatingPoint], tuple[AdaptedRows, Tensor]] | None = None
        rows = self._dense()
        self.importance_F = self.importance(rows)
        self._measured = self._measure(rows, metric)

    # ---- decided by a kind

    @abstractmethod
    def squares(self, rows: MlpRows) -> Tensor:
        """(tokens, neurons): a neuron is dropped where this times its importance is below 2 lambda ``neuron_cost``."""

    @abstractmethod
    def importance(self, rows: MlpRows) -> Tensor:
        """(neurons,), from the dense model's rows."""

    @abstractmethod
    def adapt(self, rows: MlpRows, gate_TF: Tensor, multiplier: float) -> AdaptedRows:
        """The adapted block at a multiplier, for given outputs of the gate."""

    @abstractmethod
    def neuron_cost(self) -> float:
        """Of each neuron that down reads."""

    @abstractmethod
    def adapters(self, unit: Unit, point: OperatingPoint) -> list[Adapter]:
        """Those of one of its units."""

    # ---- operating points

    def point(self, unit: Unit, multiplier: float, correction: float = 1.0) -> OperatingPoint:
        """The share of one unit: that of down has the loss and the cost of kept neurons, that of the gate what is computed
        before.

        Args:
            correction: measured over predicted loss of joint candidates in this model; 1: as measured on the block's rows.
        """
        kind = self.mlp.kind
        if unit not in (self.mlp.down_unit, self.mlp.gate_unit):
            return OperatingPoint(kind, multiplier, 0.0, 0.0)
        own = multiplier / correction
        left, right, share = self._around(math.log(own))

        def mean(name: str) -> float:
            low, high = getattr(left, name), getattr(right, name)
            return float(low + share * (high - low))

        gate_kind, format_index = (left if share < 0.5 else right).gate
        gate = self.gate.point(gate_kind, own * self.gate_discount, format_index=format_index)
        if unit == self.mlp.down_unit:
            kept = mean("kept")
            cost, loss = kept * self.neuron_cost(), correction * mean("loss")
            return OperatingPoint(kind, multiplier, cost, loss, kept, joint_multiplier=own, gate=gate)
        cost = gate.cost + mean("exact") * self.up_cost
        return OperatingPoint(kind, multiplier, cost, 0.0, joint_multiplier=own, gate=gate)

    def adapted(self, point: OperatingPoint) -> tuple[AdaptedRows, Tensor]:
        """(the block at a point, without hidden values; down's bias, including the mean change of its output)."""
        assert point.gate is not None
        if self._latest is not None and self._latest[0] == (point.joint_multiplier, point.gate):
            return self._latest[1]  # another unit at the same multiplier
        rows = self._dense()
        found = self.adapt(rows, self._gate_outputs(rows, point.gate), point.joint_multiplier)
        made: Tensor = self.problem.matrix((self.mlp.down,)) @ (rows.hidden_TF - found.hidden_TF).mean(0)
        own = self.problem.bias((self.mlp.down,))
        # thresholds are needed again, hidden values are large
        result = replace(found, hidden_TF=made.new_empty(0)), made if own is None else made + own
        self._latest = (point.joint_multiplier, point.gate), result
        return result

    def _measure(self, rows: MlpRows, metric: LossMetric) -> list[_Measured]:
        survival = Survival(self.squares(rows), self.importance_F)
        found: list[_Measured] = []
        for share in _DROPPED:
            threshold = survival.threshold(share)
            multiplier = threshold / (2 * self.neuron_cost())
            if threshold <= 0 or (found and math.log(multiplier) <= found[-1].log_multiplier):
                continue
            gate = self.gate.best(multiplier * self.gate_discount, kinds=self.gate_kinds)
            made = self.adapt(rows, self._gate_outputs(rows, gate), multiplier)
            lost_TD = (rows.hidden_TF - made.hidden_TF) @ metric.right_DI.t()
            loss = float((lost_TD - lost_TD.mean(0)).square().sum()) / (2 * max(1, len(lost_TD)))
            found.append(_Measured(math.log(multiplier), (gate.kind, gate.format_index), made.kept, made.exact, loss))
        return found or [_Measured(0.0, ("dense", 0), 0.0, 0.0, 0.0)]  # all neurons are zero

    def _around(self, log_multiplier: float) -> tuple[_Measured, _Measured, float]:
        """(the measurement below, the one above, the share of the latter); outside of all the nearest."""
        for left, right in zip(self._measured, self._measured[1:], strict=False):
            if log_multiplier < left.log_multiplier:
                return left, left, 0.0
            if log_multiplier < right.log_multiplier:
                share = (log_multiplier - left.log_multiplier) / (right.log_multiplier - left.log_multiplier)
                return left, right, share
        return self._measured[-1], self._measured[-1], 0.0

    def _gate_outputs(self, rows: MlpRows, gate: OperatingPoint) -> Tensor:
        """(tokens, neurons), of the gate at a point."""
        name = (self.mlp.gate,)
        if gate.kind == "dense":
            return rows.ups[self.mlp.block.gate]
        (made,) = build(self.problem, name, self.gate, gate)
        made = made.on(rows.x_TI.device).to(rows.x_TI.dtype)
        dense = self.problem.matrix(name), self.problem.bias(name), rows.x_TI.dtype
        return apply(made, made.tensors(), rows.x_TI, [Target(self.mlp.gate, (0, len(dense[0])), *dense)])[0]

    def _dense(self) -> MlpRows:
        step = max(1, len(self._rows_TI) // _ROWS)
        x_TI = self._rows_TI[::step].float()
        ups = up_outputs(self.problem, self.mlp.block, x_TI)
        return MlpRows(x_TI, ups, self.mlp.block.pointwise(*ups).float())
