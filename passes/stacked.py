"""The masked product of an adapter, and each linear's part of it.

    y = rana.masked_gemv(v, tau, Wt, c, scale); q, k, v = y[..., :a], y[..., a:b], y[..., b:]

In: an adapter's match in a graph and the node of v. Out: one node per linear. Where only some of the linears are in the graph,
each multiplies by its own columns of Wt, where the storage format can divide them (``Format.divisible``); elsewhere the product
is made whole and cut.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rana_fx.formats import Matrix
from rana_fx.graph.linears import Linear
from rana_fx.kernels.ops import masked_gemv
from rana_fx.passes.emit import Emitter, dtype_of
from rana_fx.passes.match import Match


class Factors:
    """The live factors of a match, as nodes in front of ``emit``'s place, each made when it is first asked for."""

    def __init__(self, emit: Emitter, match: Match) -> None:
        self._emit, self._match = emit, match
        self._made: dict[str, fx.Node | None] = {}

    def value(self, key: str) -> Tensor | None:
        """The tensor itself."""
        return self._match.attachment.tensor(self._match.index, key)

    def __getitem__(self, key: str) -> fx.Node | None:
        if key not in self._made:
            value = self.value(key)
            name = f"rana_{self._match.attachment.plan.digest()[:8]}_{self._match.index}_{key}"
            self._made[key] = None if value is None else self._emit.factor(name, value)
        return self._made[key]


def products(emit: Emitter, match: Match, factors: Factors, v: fx.Node) -> dict[Linear, fx.Node]:
    """What replaces each linear of the match. The adapter has a weight."""
    spans = spans_of(match)
    weight, scale = factors["weight"], factors["weight_scale"]
    if match.complete:
        y = masked(emit, match, v, factors["tau"], weight, factors["bias"], scale)
        return {linear: _columns(emit, y, spans[linear], match) for linear in match.linears}
    outs: dict[Linear, fx.Node] = {}
    whole: fx.Node | None = None
    for linear in match.linears:
        start, stop = spans[linear]
        if _separable(factors, start, stop):
            parts = _narrowed(emit, factors, start, stop)
            bias = None if factors["bias"] is None else emit.call(torch.narrow, factors["bias"], 0, start, stop - start)
            outs[linear] = masked(emit, match, v, factors["tau"], parts[0], bias, parts[1])
        else:
            whole = whole or masked(emit, match, v, factors["tau"], weight, factors["bias"], scale)
            outs[linear] = _columns(emit, whole, (start, stop), match)
    return outs


def masked(
    emit: Emitter,
    match: Match,
    v: fx.Node,
    tau: fx.Node | None,
    weight: fx.Node | None,
    bias: fx.Node | None,
    scale: fx.Node | None,
) -> fx.Node:
    """The product over what the adapter's own thresholds keep."""
    y = emit.call(masked_gemv, v, tau, weight, bias, scale, match.adapter.density)
    y.meta["rana_adapter"] = match.adapter.name
    return y


def cast(emit: Emitter, node: fx.Node, wanted: torch.dtype | None) -> fx.Node:
    """The node in a dtype, where both are known and differ: autocast casts what a linear reads, and nothing else."""
    return emit.method("to", node, wanted) if wanted is not None and dtype_of(node) not in (wanted, None) else node


def shifted(emit: Emitter, factors: Factors, v: fx.Node) -> fx.Node:
    """v, or v - shift."""
    shift = factors["shift"]
    return v if shift is None else emit.call(torch.sub, v, cast(emit, shift, dtype_of(v)))


def spans_of(match: Match) -> dict[Linear, tuple[int, int]]:
    """Columns of Wt that belong to each linear: sites are stacked in the adapter's order."""
    sizes = {record.name: record.out_features for record in match.attachment.plan.sites}
    starts, position = {}, 0
    for site in match.adapter.sites:
        starts[site] = position
        position += sizes[site]
    return {linear: (starts[linear.name], starts[linear.name] + linear.out_features) for linear in match.linears}


def _columns(emit: Emitter, y: fx.Node, span: tuple[int, int], match: Match) -> fx.Node:
    if len(match.adapter.sites) == 1:
        return y
    part = emit.call(torch.narrow, y, -1, span[0], span[1] - span[0])
    # what follows may view it; at one token this costs nothing, at many it fuses with the consumer
    return emit.method("contiguous", part)


def _separable(factors: Factors, start: int, stop: int) -> bool:
    """Whether columns start to stop are a stored matrix themselves."""
    stored = _stored(factors)
    return stored.format.divisible(stored, start, stop)


def _narrowed(emit: Emitter, factors: Factors, start: int, stop: int) -> tuple[fx.Node, fx.Node | None]:
    """(weight, scale) of separable columns."""
    stored = _stored(factors)
    own, scales = stored.format.spans(stored, start, stop)
    values, scale = emit.call(torch.narrow, factors["weight"], 1, own[0], own[1] - own[0]), factors["weight_scale"]
    if scales is not None:
        scale = emit.call(torch.narrow, scale, 1, scales[0], scales[1] - scales[0])
    return values, scale


def _stored(factors: Factors) -> Matrix:
    weight = factors.value("weight")
    assert weight is not None
    return Matrix.of(weight, factors.value("weight_scale"))
