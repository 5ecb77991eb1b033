"""Options of recipe "rana": the ingredients that can be left out, one by one (bench/quality/ablation.py)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from rana_fx import _moved
from rana_fx.errors import InvalidOption
from rana_fx.recipes.rana.operating_point import KINDS

ALLOCATIONS = ("multiplier", "fraction")
BITS = (8, 4)


@_moved.options(carried="error_feedback", settles="refine_lambda")
@dataclass(frozen=True, kw_only=True)
class Options:
    """The default is the whole recipe.

    Args:
        weighted: errors count by their effect on the loss; False: all alike.
        shared: linears that read one tensor are one unit; False: each is one of its own.
        kinds: of candidates.
        gates: the gate of a gated MLP candidate is adapted by itself; False: it stays dense.
        bits: in which matrices may be stored beside the model's dtype, with ``metric="bytes"``.
        error_feedback: the error of rounding a row to 4 bits is compensated in the rows after it (GPTQ); False: round to nearest.
        allocations: those that are tried: "multiplier", one lambda for the whole model, and "fraction", one fraction of its dense
            cost for every unit.
        refine_lambda: lambda is fitted again until the adapted model itself meets the budget; False: predicted costs are used.
    """

    weighted: bool = True
    shared: bool = True
    kinds: tuple[str, ...] = KINDS
    gates: bool = True
    bits: tuple[int, ...] = BITS
    error_feedback: bool = True
    allocations: tuple[str, ...] = ALLOCATIONS
    refine_lambda: bool = True

    def __post_init__(self) -> None:
        if "price" in self.allocations:
            text = 'allocations: "price" is "multiplier" now; the old name goes with the next release'
            warnings.warn(text, DeprecationWarning, stacklevel=4)
            renamed = tuple("multiplier" if name == "price" else name for name in self.allocations)
            object.__setattr__(self, "allocations", renamed)
        for name, valid in (("kinds", KINDS), ("bits", BITS), ("allocations", ALLOCATIONS)):
            given = getattr(self, name)
            if not isinstance(given, (tuple, list)) or not set(given) <= set(valid) or (name == "allocations" and not given):
                raise InvalidOption(name=name, got=given, expected=f"a tuple of some of {', '.join(map(repr, valid))}")
            object.__setattr__(self, name, tuple(given))
