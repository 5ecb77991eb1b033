"""Storage formats offered for the matrices of a unit: what reading them costs, and what rounding to them loses.

In: a unit's loss metric, its basis, its linears and the second moment of its input. Out: ``UnitFormat``s: unquantized, and with
``metric="bytes"`` also 8 and 4 bits for the weight, the router (which then lies input-major, behind a mask) and the factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rana_fx.recipes.basis import Basis
from rana_fx.recipes.rana.gptq import COLUMNS, GROUP, Packed, quantize
from rana_fx.recipes.rana.loss_metric import LossMetric
from rana_fx.recipes.rana.operating_point import JOINT_KINDS, KINDS

_SCALE_BYTES = 2.0
_MIXES = ((8, 0), (8, 8), (4, 8), (8, 4), (4, 4))  # bits of router and factor; 0: unquantized


@dataclass(frozen=True, eq=False)
class Rates:
    """Cost of one number of each matrix, in the budget's metric, times the uses of the unit."""

    weight: float  # unquantized
    router: float
    factor: float


@dataclass(frozen=True, eq=False)
class UnitFormat:
    """Formats of a unit's matrices.

    Attributes:
        kinds: of candidates that may use it.
        weight, router, factor: bits of each matrix; 0: unquantized.
        loss: of rounding the weight. losses_D: of rounding the rows of each component.
        packed: what 4-bit rounding with error feedback has computed, by site, (in, out), and "" for the router, (in, components);
            everything else is quantized again where it is needed.
    """

    kinds: tuple[str, ...]
    rates: Rates
    weight: int = 0
    router: int = 0
    factor: int = 0
    loss: float = 0.0
    losses_D: Tensor | None = None
    packed: Mapping[str, Packed] = field(default_factory=dict)

    def rounding_loss(self, kind: str, ranks: int) -> float:
        """Expected increase of the loss by rounding."""
        if kind in ("neuron", "stored"):
            return self.loss
        return 0.0 if self.losses_D is None else float(self.losses_D[:ranks].sum())

    def weight_of(self, name: str, view_OI: Tensor) -> Packed | None:
        """A site's weight, input-major, given (out, in); None: the model's own."""
        return None if self.weight == 0 else self.packed.get(name) or quantize(view_OI.t(), self.weight)

    def router_of(self, rows_RI: Tensor) -> Packed | None:
        """The router of the first components, input-major; None: unquantized."""
        if self.router == 0:
            return None
        kept = self.packed.get("")
        return quantize(rows_RI.t(), self.router) if kept is None else kept.columns(len(rows_RI))

    def factor_of(self, rows_RO: Tensor) -> Packed | None:
        """The factor's rows of the first components; None: unquantized."""
        return None if self.factor == 0 else quantize(rows_RO, self.factor)

    @property
    def rank_multiple(self) -> int:
        """The number of components is a multiple of it: with a 4-bit router two of them share a byte."""
        return 2 if self.router == 4 else 1


def unquantized(rate: float) -> UnitFormat:
    """All matrices in the model's dtype; ``rate``: cost of one number."""
    return UnitFormat(tuple(kind for kind in KINDS if kind not in ("stored", *JOINT_KINDS)), Rates(rate, rate, rate))


def quantized_formats(
    metric: LossMetric,
    basis: Basis | None,
    weights: Mapping[str, Tensor],
    moment_II: Tensor,
    *,
    rate: float,
    uses: int,
    bits: Sequence[int] = (8, 4),
    error_feedback: bool = True,
) -> list[UnitFormat]:
    """All other formats of a unit.

    Args:
        weights: by site, (out, in), fp32. moment_II: of the input, per token. rate: cost of an unquantized number.
        bits: widths to offer. error_feedback: 4-bit rounding of a row is compensated in the rows after it (GPTQ).
    """
    moment_II = moment_II.float().to(metric.right_DI.device)
    matrices = {name: weight.t() for name, weight in weights.items()}
    if basis is not None:
        matrices[""] = basis.b_DI.t()
    matrices = {name: matrix for name, matrix in matrices.items() if matrix.shape[1] % 2 == 0}
    four = _in_four_bits(matrices, moment_II if error_feedback else None) if 4 in bits else {}
    found = []
    for width in bits:
        packed = {name: four[name] for name in weights if name in four} if width == 4 else {}
        if width == 8 or len(packed) == len(weights):
            found.append(_weight_format(metric, weights, moment_II, width, uses, packed))
    mixes = [mix for mix in _MIXES if all(width in (0, *bits) for width in mix)]
    return found if basis is None else found + _factor_formats(metric, basis, moment_II, four.get(""), rate, uses, mixes)


def _in_four_bits(matrices: Mapping[str, Tensor], moment_II: Tensor | None) -> dict[str, Packed]:
    """Matrices that multiply one input, side by side: rows are rounded one after the other, however long they are."""
    if not matrices:
        return {}
    padded = [torch.nn.functional.pad(matrix.float(), (0, -matrix.shape[1] % GROUP)) for matrix in matrices.values()]
    whole, start, found = quantize(torch.cat(padded, 1), 4, moment_II), 0, {}
    for (name, matrix), wide in zip(matrices.items(), padded, strict=True):
        stop = start + wide.shape[1]
        part = Packed(whole.matrix[:, start // 2 : stop // 2], whole.scale[:, start // GROUP : stop // GROUP])
        found[name] = part.columns(matrix.shape[1])
        start = stop
    return found


def _rate(bits: int, columns: int, uses: int) -> float:
    """Bytes of a number, its share of a scale included, times its uses per token."""
    return uses * (1 + _SCALE_BYTES / columns if bits == 8 else 0.5 + _SCALE_BYTES * -(-columns // GROUP) / columns)


def _weight_format(
    metric: LossMetric, weights: Mapping[str, Tensor], moment_II: Tensor, bits: int, uses: int, packed: Mapping[str, Packed]
) -> UnitFormat:
    squares = []
    for name, weight in weights.items():
        dequantized = (packed[name] if packed else quantize(weight.t(), bits)).dequantize()
        squares.append(_squares(dequantized.sub_(weight.t()), moment_II))
    outs = sum(len(weight) for weight in weights.values())
    rate = sum(_rate(bits, len(weight), uses) * len(weight) for weight in weights.values()) / outs
    loss = float(metric.loss_of_outputs(torch.cat(squares)))
    return UnitFormat(("stored", "neuron"), Rates(rate, rate, rate), bits, loss=loss, packed=packed)


def _squares(matrix_IN: Tensor, moment_II: Tensor) -> Tensor:
    """Mean square of every column of x M."""
    parts = matrix_IN.split(COLUMNS, dim=1)  # of a vocabulary, piece by piece
    return torch.cat([((moment_II @ part) * part).sum(0) for part in parts]).clamp_min(0)


def _factor_formats(
    metric: LossMetric,
    basis: Basis,
    moment_II: Tensor,
    four: Packed | None,
    rate: float,
    uses: int,
    mixes: Sequence[tuple[int, int]],
) -> list[UnitFormat]:
    """``four``: the router in 4 bits. ``rate``: of an unquantized factor."""
    components, out = len(basis.b_DI), len(basis.a_OD)
    router_losses: dict[int, Tensor] = {}
    factor_losses: dict[int, Tensor] = {0: moment_II.new_zeros(components)}
    energy_D = _squares(basis.b_DI.t(), moment_II)
    for bits in (8, 4):
        router = quantize(basis.b_DI.t(), 8) if bits == 8 else four
        if router is not None:
            router_losses[bits] = _squares(router.dequantize() - basis.b_DI.t(), moment_II) / 2
        if bits == 8 or out % 2 == 0:
            factor = quantize(basis.a_OD.t(), bits).dequantize()
            factor_losses[bits] = energy_D * metric.loss_of_outputs(factor.sub_(basis.a_OD.t()).square_())
    found = []
    for router_bits, factor_bits in mixes:
        if router_bits in router_losses and factor_bits in factor_losses:
            factor_rate = _rate(factor_bits, out, uses) if factor_bits else rate
            rates = Rates(rate, _rate(router_bits, components, uses), factor_rate)
            losses_D = (router_losses[router_bits] + factor_losses[factor_bits]).cpu()
            packed = {"": four} if router_bits == 4 and four is not None else {}
            made = UnitFormat(("hybrid",), rates, router=router_bits, factor=factor_bits, losses_D=losses_D, packed=packed)
            found.append(made)
    return found
