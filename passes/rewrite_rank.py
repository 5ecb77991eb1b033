"""Replace linears that have a rank adapter (or a static one): router, mask, product.

    q = linear(x, w_q); k = linear(x, w_k); v = linear(x, w_v)
  becomes
    z = rana.router(x, B, B_scale); y = rana.masked_gemv(z - shift, tau, At, c, At_scale); q, k, v = y[..., :a], ...
  or, where the router is masked by its input and stored transposed,
    z = rana.masked_gemv(x, router_tau, B^T, None, B_scale); ...
  and, where the adapter has thresholds on its outputs, large ones are computed again (``exact_rows``).

RaNA Algorithm 3. One router serves all linears of the adapter that read one tensor. Where only some of them are in
the graph, each takes its own columns of At (``stacked``).
"""

from __future__ import annotations

import torch
from torch import fx

from rana_fx.kernels.ops import masked_gemv, router
from rana_fx.passes.emit import Emitter, dtype_of
from rana_fx.passes.exact_rows import exact_rows
from rana_fx.passes.match import Match
from rana_fx.passes.stacked import Factors, cast, products, shifted


def rewrite_rank(graph_module: fx.GraphModule, match: Match) -> int:
    """Rewrite one match; returns how many linears it replaced."""
    if match.adapter.kind not in ("rank", "static"):
        return 0
    first = match.linears[0]
    emit = Emitter(graph_module, first.node)
    factors = Factors(emit, match)
    wanted = dtype_of(first.node)
    z = cast(emit, _router(emit, match, factors, wanted), wanted)
    outs = products(emit, match, factors, shifted(emit, factors, z))
    for linear, out in outs.items():
        linear.node.replace_all_uses_with(exact_rows(graph_module, match, linear, out))
        graph_module.graph.erase_node(linear.node)
    return len(outs)


def _router(emit: Emitter, match: Match, factors: Factors, wanted: torch.dtype | None) -> fx.Node:
    """z = B x. ``wanted``: the dtype the dense linear would have made, under autocast not that of x."""
    adapter, x, rows, scale = match.adapter, match.x, factors["router"], factors["router_scale"]
    assert rows is not None
    if adapter.router_tau is not None:
        x = cast(emit, x, wanted)
        z = emit.call(masked_gemv, x, factors["router_tau"], rows, None, scale, adapter.router_density)
        z.meta["rana_part"] = "router_tau"
    elif scale is not None:
        z = emit.call(router, cast(emit, x, wanted), rows, scale)
    else:
        plain = wanted in (None, dtype_of(x)) and dtype_of(x) == dtype_of(rows)
        # autocast casts what a linear reads, and nothing else
        z = emit.call(router if plain else torch.nn.functional.linear, x, rows)
    z.meta["rana_adapter"] = adapter.name
    return z
