"""``Cost`` and ``Kept`` per token: the two quantities that adapters, plans, recipes and measurements share.

A ``Cost`` always holds both metrics, so that neither is computed from the other's numbers by mistake; a ``Kept`` holds what the
cost of an adapter depends on besides its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rana_fx.errors import UnknownMetric

METRICS = ("flops", "bytes")
SCOPES = ("blocks", "all")  # which linears a budget counts (rana_fx/calibration/layout.py)


@dataclass(frozen=True, slots=True)
class Cost:
    """Expected cost per token. flops: multiply-adds. bytes: bytes of weights read, scales included.

    ``cost["flops"]`` and ``cost["bytes"]`` read one metric (UnknownMetric otherwise). Costs add and subtract, and scale by a
    number; ``sum(costs, Cost())`` is the total of several.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __getitem__(self, metric: str) -> float:
        if metric == "flops":
            return self.flops
        if metric == "bytes":
            return self.bytes
        raise UnknownMetric(kind="metric", got=metric, valid=", ".join(METRICS))

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.flops - other.flops, self.bytes - other.bytes)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.flops * factor, self.bytes * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Cost:
        return Cost(self.flops / divisor, self.bytes / divisor)

    def over(self, dense: Cost) -> Cost:
        """Each metric as a fraction of ``dense``, which is positive in both."""
        return Cost(self.flops / dense.flops, self.bytes / dense.bytes)


@dataclass(frozen=True, slots=True)
class Kept:
    """Mean number of values that an adapter keeps per token: expected, simulated or measured. None: the adapter's expectation.

    Attributes:
        ranks: rows of its weight that the mask keeps, in [0, ranks].
        inputs: inputs that a masked router reads, in [0, in].
        outputs: outputs that are computed from the model's own weight, in [0, out].
    """

    ranks: float | None = None
    inputs: float | None = None
    outputs: float | None = None

    def otherwise(self, other: Kept) -> Kept:
        """A copy in which fields that are None are taken from ``other``."""
        return Kept(
            other.ranks if self.ranks is None else self.ranks,
            other.inputs if self.inputs is None else self.inputs,
            other.outputs if self.outputs is None else self.outputs,
        )

    @classmethod
    def by_name(
        cls,
        ranks: Mapping[str, float | Kept] | None = None,
        inputs: Mapping[str, float] | None = None,
        outputs: Mapping[str, float] | None = None,
    ) -> dict[str, Kept]:
        """One ``Kept`` for each adapter name that occurs, from means by name. A ``Kept`` in ``ranks`` is taken as it is."""
        ranks, inputs, outputs = ranks or {}, inputs or {}, outputs or {}
        found: dict[str, Kept] = {}
        for name in dict.fromkeys([*ranks, *inputs, *outputs]):
            first = ranks.get(name)
            own = first if isinstance(first, Kept) else cls(first)
            found[name] = own.otherwise(cls(None, inputs.get(name), outputs.get(name)))
        return found
