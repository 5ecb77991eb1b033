"""Compute the large outputs of a rank adapter exactly, from the model's own weight, reading these rows of it alone.

    y = rana.masked_gemv(z, tau, At, c)                      in the place of linear(x, w, b)
  becomes
    y = rana.masked_gemv(z, tau, At, c); a = (y >= exact_tau).type_as(y)
    e = rana.masked_rows(x, a, w, b); y = where(a != 0, e, y)

Where gradients flow e is the linear itself, so that both branches have theirs: there tokens are many, which would read every row
between them, and what a backward pass needs of the linear would have to be made again. The mask is a constant in the backward
pass. The last selection is by a, and not by the comparison it came from: a compiler that fused that anew, on sums not yet
rounded, could decide otherwise than for the rows that were read.
"""

from __future__ import annotations

import torch
from torch import fx

from rana_fx.graph.linears import Linear
from rana_fx.kernels.ops import masked_rows
from rana_fx.passes.emit import Emitter, dtype_of
from rana_fx.passes.match import Match, gradients_flow
from rana_fx.passes.stacked import Factors, cast

PART = "exact_tau"  # of the adapter, as what is measured of it is named


def exact_rows(graph_module: fx.GraphModule, match: Match, linear: Linear, y: fx.Node) -> fx.Node:
    """y, the adapter's output in the place of ``linear``, or y with its large elements exact."""
    emit = Emitter(graph_module, linear.node)
    tau = Factors(emit, match)[PART]
    if tau is None:
        return y
    factor, transposed = linear.factor
    weight = emit.call(torch.t, factor) if transposed else factor
    # compared in fp32, whatever the dtype of y
    gate = emit.method("type_as", emit.call(torch.ge, y, tau), y)
    if gradients_flow(match, linear.node):
        exact = emit.call(torch.nn.functional.linear, linear.x, weight, linear.bias_node)
    else:
        # under autocast in the dtype that the linear would have made
        x = cast(emit, linear.x, dtype_of(y))
        exact = emit.call(masked_rows, x, gate, weight, linear.bias_node, match.adapter.exact_density)
        exact.meta["rana_adapter"], exact.meta["rana_part"] = match.adapter.name, PART
    return emit.call(torch.where, emit.call(torch.ne, gate, 0), exact, y)
