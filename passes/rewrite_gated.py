"""Zero the activated gate where it is small, as CATS does, and skip the zeros in the down projection.

    y = linear(act(linear(x, w_gate)) * linear(x, w_up), w_down)
  becomes
    a = act(linear(x, w_gate)); a = where(a^2 >= tau, a, 0); y = rana.masked_gemv(a * linear(x, w_up), 0+, w_down.t())

tau is one number, or one for each neuron. The rows of w_up that the mask makes useless are still multiplied here; a plan's cost
counts them as skipped, as the published kernel does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from rana_fx.graph import is_pointwise, is_row_view, op_name, tensor_inputs
from rana_fx.kernels.ops import masked_gemv
from rana_fx.kernels.reference import kept
from rana_fx.passes.emit import Emitter
from rana_fx.passes.match import Match
from rana_fx.sites import Linear

_TINY = torch.finfo(torch.float32).tiny  # as a threshold: exactly the zeros are skipped


def gate_mask(a: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """a where a^2 >= tau, else 0."""
    return torch.where(kept(a, tau), a, a.new_zeros(()))


def rewrite_gated(graph_module: fx.GraphModule, match: Match) -> int:
    """Rewrite one match; returns how many linears it replaced."""
    if match.adapter.kind != "gated":
        return 0
    value = match.attachment.tensor(match.index, "tau")
    assert value is not None
    replaced = 0
    for linear in match.linears:
        found = _activated_gate(linear, match)
        if found is None:
            continue
        product, gate = found
        emit = Emitter(graph_module, product)
        tau = emit.factor(f"rana_{match.attachment.plan.digest()[:8]}_{match.index}_tau", value)
        masked = emit.call(gate_mask, gate, tau)
        masked.meta["rana_adapter"] = match.adapter.name
        product.replace_input_with(gate, masked)
        emit = Emitter(graph_module, linear.node)
        tiny = torch.full((match.adapter.ranks,), _TINY, device=value.device)
        zeros = emit.factor(f"rana_{match.attachment.plan.digest()[:8]}_{match.index}_zeros", tiny)
        factor, transposed = linear.factor
        weight = factor if transposed else emit.call(torch.t, factor)
        bias, own = linear.bias_node, match.attachment.tensor(match.index, "bias")
        if own is not None:
            bias = emit.factor(f"rana_{match.attachment.plan.digest()[:8]}_{match.index}_bias", own)
        y = emit.call(masked_gemv, linear.x, zeros, weight, bias, None, match.adapter.density)
        y.meta["rana_adapter"] = match.adapter.name
        linear.node.replace_all_uses_with(y)
        graph_module.graph.erase_node(linear.node)
        replaced += 1
    return replaced


def _activated_gate(down: Linear, match: Match) -> tuple[fx.Node, fx.Node] | None:
    """(the product, its factor that comes from the gate) above the down projection."""
    node = down.x
    while is_row_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if op_name(node) != "mul":
        return None
    for source in tensor_inputs(node):
        if match.adapter.gate in _sites_behind(source, match.named):
            return node, source
    return None


def _sites_behind(node: fx.Node, named: Mapping[fx.Node, str]) -> set[str]:
    """Names of the linears a pointwise chain starts from."""
    found: set[str] = set()
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in named:
            found.add(named[current])
        elif current.op in ("call_function", "call_method") and (is_pointwise(current) or is_row_view(current)):
            todo.extend(tensor_inputs(current))
    return found
