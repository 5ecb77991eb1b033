"""Decisions of the allocation: a unit alone, or all units of an MLP, which may take one candidate together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rana_fx.adapter import Adapter
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.builders import build
from rana_fx.recipes.rana.candidates import UnitCandidates
from rana_fx.recipes.rana.mlp_candidate import MlpCandidate
from rana_fx.recipes.rana.operating_point import JOINT_KINDS, OperatingPoint
from rana_fx.recipes.rana.units import Unit

Points = dict[Unit, OperatingPoint]


@dataclass(frozen=True)
class Choice:
    """The candidate of a unit: its kind, and the index of its format."""

    kind: str
    format_index: int = 0

    @classmethod
    def of(cls, point: OperatingPoint) -> Choice:
        return cls(point.kind, point.format_index)


@dataclass(frozen=True, eq=False)
class Decision:
    """What is decided at once.

    Attributes:
        candidates: of each unit, taken by itself. joint: the candidate that all of these units take together, if there is one.
    """

    candidates: dict[Unit, UnitCandidates]
    joint: MlpCandidate | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(self.candidates)

    @property
    def dense_cost(self) -> float:
        return sum(candidates.dense_cost for candidates in self.candidates.values())

    def point(self, unit: Unit, choice: Choice, multiplier: float, correction: float) -> OperatingPoint:
        """Of one unit, as chosen. ``correction``: see ``MlpCandidate.point``."""
        if choice.kind in JOINT_KINDS:
            assert self.joint is not None
            return self.joint.point(unit, multiplier, correction)
        return self.candidates[unit].point(choice.kind, multiplier, format_index=choice.format_index)

    def best(self, multiplier: float, *, joint: bool, correction: float) -> Points:
        """The points with the least Lagrangian: the joint candidate's, or the best of each unit. ``joint`` False: the latter."""
        apart = {unit: candidates.best(multiplier) for unit, candidates in self.candidates.items()}
        if self.joint is None or not joint:
            return apart
        together = {unit: self.joint.point(unit, multiplier, correction) for unit in apart}
        return together if _lagrangian(together) < _lagrangian(apart) else apart

    def joint_choices(self) -> dict[Unit, Choice]:
        """Every unit as its share of the joint candidate."""
        assert self.joint is not None
        return dict.fromkeys(self.candidates, Choice(self.joint.mlp.kind))

    def moves(self, one: Mapping[Unit, OperatingPoint], other: Mapping[Unit, OperatingPoint]) -> list[tuple[Unit, ...]]:
        """Units that change their candidates together between two allocations: all, where either has the joint candidate."""
        if any(points[self.units[0]].kind in JOINT_KINDS for points in (one, other)):
            return [self.units]
        return [(unit,) for unit in self.units]

    def adapters(self, problem: Problem, unit: Unit, point: OperatingPoint) -> list[Adapter]:
        """The adapters of one unit at a point; none where it stays dense."""
        if point.kind in JOINT_KINDS:
            assert self.joint is not None
            return self.joint.adapters(unit, point)
        return build(problem, unit, self.candidates[unit], point)


def _lagrangian(points: Points) -> float:
    return sum(point.lagrangian for point in points.values())
