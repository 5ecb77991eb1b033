"""Replace linears that have a rank adapter (or a static one): router, mask, product.

    q = linear(x, w_q); k = linear(x, w_k); v = linear(x, w_v)
  becomes
    z = rana.router(x, B); y = rana.masked_gemv(z, tau, At, c); q, k, v = y[..., :a], y[..., a:b], y[..., b:]

RaNA Algorithm 3. One router serves all linears of the adapter that read one tensor. Where only some of them are in
the graph, each takes its own columns of At.
"""

from __future__ import annotations

import torch
from torch import fx

from rana_fx.kernels.ops import masked_gemv, router
from rana_fx.passes.emit import Emitter, dtype_of
from rana_fx.passes.match import Match
from rana_fx.sites import Linear


def rewrite_rank(graph_module: fx.GraphModule, match: Match) -> int:
    """Rewrite one match; returns how many linears it replaced."""
    if match.adapter.kind not in ("rank", "static"):
        return 0
    first = match.linears[0]
    emit = Emitter(graph_module, first.node)
    prefix = f"rana_{match.attachment.plan.digest()[:8]}_{match.index}"
    factors: dict[str, fx.Node | None] = {}
    for key in ("router", "tau", "weight", "bias"):
        value = match.attachment.tensor(match.index, key)
        factors[key] = None if value is None else emit.factor(f"{prefix}_{key}", value)
    x = match.x
    wanted = dtype_of(first.node)
    rows = factors["router"]
    assert rows is not None
    plain = wanted in (None, dtype_of(x)) and dtype_of(x) == dtype_of(rows)
    # autocast casts what a linear reads, and nothing else
    z = emit.call(router if plain else torch.nn.functional.linear, x, rows)
    if wanted is not None and dtype_of(z) not in (wanted, None):
        z = emit.method("to", z, wanted)
    z.meta["rana_adapter"] = match.adapter.name
    spans = _spans(match)
    if match.complete:
        y = emit.call(masked_gemv, z, factors["tau"], factors["weight"], factors["bias"], None, match.adapter.density)
        y.meta["rana_adapter"] = match.adapter.name
        outs = {linear: _columns(emit, y, spans[linear], match.adapter.sites) for linear in match.linears}
    else:
        outs = {}
        for linear in match.linears:
            start, stop = spans[linear]
            weight = emit.call(torch.narrow, factors["weight"], 1, start, stop - start)
            bias = None if factors["bias"] is None else emit.call(torch.narrow, factors["bias"], 0, start, stop - start)
            outs[linear] = emit.call(masked_gemv, z, factors["tau"], weight, bias, None, match.adapter.density)
            outs[linear].meta["rana_adapter"] = match.adapter.name
    for linear, out in outs.items():
        linear.node.replace_all_uses_with(out)
        graph_module.graph.erase_node(linear.node)
    return len(outs)


def _spans(match: Match) -> dict[Linear, tuple[int, int]]:
    """Columns of At that belong to each linear: sites are stacked in the adapter's order."""
    sizes = {record.name: record.out_features for record in match.attachment.plan.sites}
    starts, position = {}, 0
    for site in match.adapter.sites:
        starts[site] = position
        position += sizes[site]
    return {linear: (starts[linear.name], starts[linear.name] + linear.out_features) for linear in match.linears}


def _columns(emit: Emitter, y: fx.Node, span: tuple[int, int], sites: tuple[str, ...]) -> fx.Node:
    if len(sites) == 1:
        return y
    part = emit.call(torch.narrow, y, -1, span[0], span[1] - span[0])
    # what follows may view it; at one token this costs nothing, at many it fuses with the consumer
    return emit.method("contiguous", part)
