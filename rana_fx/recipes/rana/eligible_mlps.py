"""MLP blocks eligible for joint candidates (mlp_candidate.py): their linears are units of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rana_fx.calibration.layout import Layout, MlpBlock
from rana_fx.recipes.rana.operating_point import JOINT_KINDS
from rana_fx.recipes.rana.units import Unit


@dataclass(frozen=True, eq=False)
class EligibleMlp:
    """A block, the kind of its joint candidate, and the units that hold its sites and no other site."""

    kind: str
    block: MlpBlock
    units: tuple[Unit, ...]

    @property
    def gate(self) -> str:
        """The linear whose output decides which neurons are kept: the activated gate, or up where there is no gate."""
        return self.block.ups[self.block.gate]

    @property
    def up(self) -> str:
        """The linear whose rows are skipped; without a gate it is ``gate``."""
        return next((up for up in self.block.ups if up != self.gate), self.gate)

    @property
    def down(self) -> str:
        return self.block.down

    @property
    def down_unit(self) -> Unit:
        """The unit of down; it has all of the joint candidate's loss."""
        return self._unit(self.down)

    @property
    def gate_unit(self) -> Unit:
        """The unit of the gate; it has the cost of what is computed before down."""
        return self._unit(self.gate)

    def _unit(self, site: str) -> Unit:
        return next(unit for unit in self.units if site in unit)


def eligible_mlps(layout: Layout, units: Iterable[Unit], kinds: Sequence[str] = JOINT_KINDS) -> list[EligibleMlp]:
    """Blocks whose units hold nothing else and are used equally often by a token, one neuron for each output of every up."""
    unit_of = {name: unit for unit in units for name in unit}
    found = []
    for block in layout.blocks:
        kind = "gated" if block.activation is not None else "exact" if len(block.ups) == 1 else None
        if kind is None or kind not in kinds or not all(name in unit_of for name in block.sites):
            continue
        held = tuple(dict.fromkeys(unit_of[name] for name in block.sites))
        widths = {*(layout.sites[up].out_features for up in block.ups), layout.sites[block.down].in_features}
        uses = {layout.sites[name].uses for name in block.sites}
        if len(widths) == len(uses) == 1 and {name for unit in held for name in unit} == set(block.sites):
            found.append(EligibleMlp(kind, block, held))
    return found
