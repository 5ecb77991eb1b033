"""In how many bits the matrices of a unit may be stored, what that costs and what rounding does to the loss.

In: a unit's geometry, its basis, its linears and the second moment of its input. Out: ``Storage``s: the model's own numbers,
and with ``metric="bytes"`` also 8 and 4 bits for the weight, the router (which then lies input-major, behind a mask) and the
factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rana_fx.recipes.rana.gptq import GROUP, Packed, rounded
from rana_fx.recipes.rana.loss_metric import Geometry, LossBasis
from rana_fx.recipes.rana.operating_point import CUTS

KINDS = ("dense", "neuron", "rank", "hybrid", "static", "stored", "gated", "exact")  # entries of the menu, and cuts

_SCALE = 2.0  # bytes of a scale
_MIXES = ((8, 0), (8, 8), (4, 8), (8, 4), (4, 4))  # bits of router and factor; 0: the model's own


@dataclass(frozen=True, eq=False)
class Rates:
    """Cost of one number of each matrix, in the budget's metric, times the uses of the unit."""

    weight: float  # the model's own
    router: float
    factor: float


@dataclass(frozen=True, eq=False)
class Storage:
    """One way to store a unit.

    ``kinds``: of the menu, that it serves. ``weight``, ``router``, ``factor``: bits of each matrix; 0: the model's own numbers.
    ``loss``: of rounding the weight. ``losses_D``: of rounding a component's rows. What rounding in 4 bits worked out is kept,
    ``packed``: by site, (in, out), and "" for the router, (in, components); the rest is rounded again where it is wanted.
    """

    kinds: tuple[str, ...]
    rates: Rates
    weight: int = 0
    router: int = 0
    factor: int = 0
    loss: float = 0.0
    losses_D: Tensor | None = None
    packed: Mapping[str, Packed] = field(default_factory=dict)

    def rounding(self, kind: str, ranks: int) -> float:
        """Expected increase of the loss by rounding."""
        if kind in ("neuron", "stored"):
            return self.loss
        return 0.0 if self.losses_D is None else float(self.losses_D[:ranks].sum())

    def weight_of(self, name: str, view_OI: Tensor) -> Packed | None:
        """A site's weight, input-major, given (out, in); None: as the model has it."""
        return None if self.weight == 0 else self.packed.get(name) or rounded(view_OI.t(), self.weight)

    def router_of(self, rows_RI: Tensor) -> Packed | None:
        """The first components' router, input-major; None: as it is."""
        if self.router == 0:
            return None
        kept = self.packed.get("")
        return rounded(rows_RI.t(), self.router) if kept is None else kept.columns(len(rows_RI))

    def factor_of(self, rows_RO: Tensor) -> Packed | None:
        """The first components' rows of the factor; None: as they are."""
        return None if self.factor == 0 else rounded(rows_RO, self.factor)

    @property
    def even(self) -> bool:
        """Whether a router needs an even number of components: two share a byte."""
        return self.router == 4


def own(one: float) -> Storage:
    """Everything in the model's own numbers; ``one``: what a number costs."""
    return Storage(tuple(kind for kind in KINDS if kind not in ("stored", *CUTS)), Rates(one, one, one))


def in_fewer_bits(
    geometry: Geometry,
    basis: LossBasis | None,
    weights: Mapping[str, Tensor],
    moment_II: Tensor,
    *,
    one: float,
    uses: int,
    bits: Sequence[int] = (8, 4),
    carried: bool = True,
) -> list[Storage]:
    """All other storages of a unit.

    Args:
        weights: by site, (out, in), fp32. moment_II: of the input, per token. one: cost of a number of the model's own.
        bits: widths to offer. carried: rounding a row in 4 bits makes up for what the rows before it lost.
    """
    moment_II = moment_II.float().to(geometry.read_DI.device)
    matrices = {name: weight.t() for name, weight in weights.items()}
    if basis is not None:
        matrices[""] = basis.b_DI.t()
    matrices = {name: matrix for name, matrix in matrices.items() if matrix.shape[1] % 2 == 0}
    four = _in_four_bits(matrices, moment_II if carried else None) if 4 in bits else {}
    found = []
    for width in bits:
        packed = {name: four[name] for name in weights if name in four} if width == 4 else {}
        if width == 8 or len(packed) == len(weights):
            found.append(_weights(geometry, weights, moment_II, width, uses, packed))
    mixes = [mix for mix in _MIXES if all(width in (0, *bits) for width in mix)]
    return found if basis is None else found + _factors(geometry, basis, moment_II, four.get(""), one, uses, mixes)


def _in_four_bits(matrices: Mapping[str, Tensor], moment_II: Tensor | None) -> dict[str, Packed]:
    """Matrices that multiply one input, side by side: rows are rounded one after the other, however long they are."""
    if not matrices:
        return {}
    padded = [torch.nn.functional.pad(matrix.float(), (0, -matrix.shape[1] % GROUP)) for matrix in matrices.values()]
    whole, start, found = rounded(torch.cat(padded, 1), 4, moment_II), 0, {}
    for (name, matrix), wide in zip(matrices.items(), padded, strict=True):
        stop = start + wide.shape[1]
        part = Packed(whole.matrix[:, start // 2 : stop // 2], whole.scale[:, start // GROUP : stop // GROUP])
        found[name] = part.columns(matrix.shape[1])
        start = stop
    return found


def _rate(bits: int, columns: int, uses: int) -> float:
    """Bytes of a number, its share of a scale included."""
    return uses * (1 + _SCALE / columns if bits == 8 else 0.5 + _SCALE * -(-columns // GROUP) / columns)


def _weights(
    geometry: Geometry, weights: Mapping[str, Tensor], moment_II: Tensor, bits: int, uses: int, packed: Mapping[str, Packed]
) -> Storage:
    error = 0.0
    for name, weight in weights.items():
        wide = (packed[name] if packed else rounded(weight.t(), bits)).wide()
        error += float(_squares(wide - weight.t(), moment_II).sum())
    outs = sum(len(weight) for weight in weights.values())
    rate = sum(_rate(bits, len(weight), uses) * len(weight) for weight in weights.values()) / outs
    return Storage(("stored", "neuron"), Rates(rate, rate, rate), bits, loss=geometry.even * error / 2, packed=packed)


def _squares(matrix_IN: Tensor, moment_II: Tensor) -> Tensor:
    """Mean square of every column of x M."""
    return ((moment_II @ matrix_IN) * matrix_IN).sum(0).clamp_min(0)


def _factors(
    geometry: Geometry,
    basis: LossBasis,
    moment_II: Tensor,
    four: Packed | None,
    one: float,
    uses: int,
    mixes: Sequence[tuple[int, int]],
) -> list[Storage]:
    components, out = len(basis.b_DI), len(basis.a_OD)
    router_losses: dict[int, Tensor] = {}
    factor_losses: dict[int, Tensor] = {0: moment_II.new_zeros(components)}
    energy_D = _squares(basis.b_DI.t(), moment_II)
    for bits in (8, 4):
        router = rounded(basis.b_DI.t(), 8) if bits == 8 else four
        if router is not None:
            router_losses[bits] = _squares(router.wide() - basis.b_DI.t(), moment_II) / 2
        if bits == 8 or out % 2 == 0:
            factor = rounded(basis.a_OD.t(), bits).wide()
            factor_losses[bits] = geometry.even * energy_D * (factor - basis.a_OD.t()).square().sum(1) / 2
    found = []
    for router_bits, factor_bits in mixes:
        if router_bits in router_losses and factor_bits in factor_losses:
            rates = Rates(one, _rate(router_bits, components, uses), _rate(factor_bits, out, uses) if factor_bits else one)
            losses_D = (router_losses[router_bits] + factor_losses[factor_bits]).cpu()
            packed = {"": four} if router_bits == 4 and four is not None else {}
            found.append(Storage(("hybrid",), rates, router=router_bits, factor=factor_bits, losses_D=losses_D, packed=packed))
    return found
