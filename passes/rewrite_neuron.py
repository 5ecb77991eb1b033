"""Replace linears that have a neuron adapter: skip inputs too small to matter.

    y = linear(h, w, b)
  becomes
    y = rana.masked_gemv(h, tau, w.t(), b)        # keep j where h_j^2 >= tau_j = t^2 / |w_:,j|^2

The weight stays the model's own, so there is no copy of it and gradients reach it (RaNA section 4, down projection).
"""

from __future__ import annotations

import torch
from torch import fx

from rana_fx.kernels.ops import masked_gemv
from rana_fx.passes.emit import Emitter, dtype_of
from rana_fx.passes.match import Match


def rewrite_neuron(graph_module: fx.GraphModule, match: Match) -> int:
    """Rewrite one match; returns how many linears it replaced."""
    if match.adapter.kind != "neuron":
        return 0
    value = match.attachment.tensor(match.index, "tau")
    assert value is not None
    for linear in match.linears:
        emit = Emitter(graph_module, linear.node)
        tau = emit.factor(f"rana_{match.attachment.plan.digest()[:8]}_{match.index}_tau", value)
        x, wanted = linear.x, dtype_of(linear.node)
        if wanted is not None and dtype_of(x) not in (wanted, None):
            x = emit.method("to", x, wanted)  # autocast: the dense layer would have cast its input, too
        factor, transposed = linear.factor
        weight = factor if transposed else emit.call(torch.t, factor)
        y = emit.call(masked_gemv, x, tau, weight, linear.bias_node, None, match.adapter.density)
        y.meta["rana_adapter"] = match.adapter.name
        linear.node.replace_all_uses_with(y)
        graph_module.graph.erase_node(linear.node)
    return len(match.linears)
