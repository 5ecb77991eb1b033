"""Replace linears that have a neuron adapter: skip inputs too small to matter. Or a stored one, which skips none.

    y = linear(h, w, b)
  becomes, with the model's own weight,
    y = rana.masked_gemv(h, tau, w.t(), b)        # keep j where h_j^2 >= tau_j = t^2 / |w_:,j|^2
  or, with a weight of the adapter's (in fewer bits, or of several linears over one input)
    y = rana.masked_gemv(h - shift, tau, Wt, c, scale); q, k, v = y[..., :a], ...

In the first case there is no copy of the weight and gradients reach it (RaNA section 4, down projection).
"""

from __future__ import annotations

import torch
from torch import fx

from rana_fx.passes.emit import Emitter, dtype_of
from rana_fx.passes.match import Match
from rana_fx.passes.stacked import Factors, cast, masked, products, shifted, spans_of


def rewrite_neuron(graph_module: fx.GraphModule, match: Match) -> int:
    """Rewrite one match; returns how many linears it replaced."""
    if match.adapter.kind not in ("neuron", "stored"):
        return 0
    outs = _by_own_weight(graph_module, match) if match.adapter.weight is not None else _by_the_models(graph_module, match)
    for node, out in outs.items():
        node.replace_all_uses_with(out)
        graph_module.graph.erase_node(node)
    return len(outs)


def _by_own_weight(graph_module: fx.GraphModule, match: Match) -> dict[fx.Node, fx.Node]:
    first = match.linears[0]
    emit = Emitter(graph_module, first.node)
    factors = Factors(emit, match)
    v = shifted(emit, factors, cast(emit, match.x, dtype_of(first.node)))
    return {linear.node: out for linear, out in products(emit, match, factors, v).items()}


def _by_the_models(graph_module: fx.GraphModule, match: Match) -> dict[fx.Node, fx.Node]:
    outs = {}
    for linear in match.linears:
        emit = Emitter(graph_module, linear.node)
        factors = Factors(emit, match)
        x = shifted(emit, factors, cast(emit, linear.x, dtype_of(linear.node)))
        matrix, transposed = linear.factor
        weight = matrix if transposed else emit.call(torch.t, matrix)
        bias = factors["bias"]
        if bias is None:
            bias = linear.bias_node
        elif len(match.adapter.sites) > 1:
            start, stop = spans_of(match)[linear]
            bias = emit.call(torch.narrow, bias, 0, start, stop - start)
        outs[linear.node] = masked(emit, match, x, factors["tau"], weight, bias, None)
    return outs
