"""Zero the activated gate where it is small, as CATS does, and skip the rows of up and down that these zeros multiply.

    y = linear(act(linear(x, w_gate)) * linear(x, w_up), w_down)
  becomes
    a = act(linear(x, w_gate)); a = where(a^2 >= tau, a, 0)
    h = rana.masked_rows(x, a, w_up); y = rana.masked_gemv(h, 0+, w_down.t())

tau is one number, or one for each neuron. So a decoded token costs what the plan counts. Both operations multiply by the model's
own weights. Up is not changed, and only down skips rows, where up's linear has an adapter of its own or other users (gate and up
in one), or is not the only other factor of the product; where a tensor is written in between; and where gradients flow: there
tokens are many, and up would have to be recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from rana_fx.apply import cast, gate_mask
from rana_fx.graph.dataflow import (
    is_reshape,
    is_row_view,
    shape_of,
    statically_equal,
    tensor_inputs,
    value_of,
    walk,
)
from rana_fx.graph.effects import written
from rana_fx.graph.functionalize import Writes
from rana_fx.graph.linears import Linear
from rana_fx.graph.matmuls import operands_of
from rana_fx.graph.ops import is_call, is_pointwise, op_name
from rana_fx.kernels.ops import masked_rows
from rana_fx.passes.emit import Annotation, Emitter, Factors, annotate, dtype_of
from rana_fx.passes.match import Match, gradients_flow
from rana_fx.passes.rewrite_adapter import replace


def rewrite_gated(graph_module: fx.GraphModule, match: Match) -> int:
    """Rewrite one match; returns how many linears it replaced."""
    if match.adapter.kind != "gated":
        return 0
    replaced = 0
    for linear in match.linears:
        found = _activated_gate(linear, match)
        if found is None:
            continue
        product, gate = found
        emit = Emitter(graph_module, product)
        masked = emit.call(gate_mask, gate, Factors(emit, match)["tau"].node)
        annotate(masked, Annotation(match.adapter.name))
        product.replace_input_with(gate, masked)
        chain = _chain_to_up(product, masked, match)
        if chain:
            _skip_rows(emit, product, masked, chain, match)
        replaced += replace(graph_module, match, [linear])
    return replaced


def _chain_to_up(product: fx.Node, masked: fx.Node, match: Match) -> list[fx.Node]:
    """The other factor of the product and the chain of reshapes to up's linear; empty where up must stay dense."""
    others = [node for node in product.args if node is not masked]
    value = value_of(product)
    if len(others) != 1 or product.kwargs or written(product) or not isinstance(value, torch.Tensor):
        return []
    if gradients_flow(match, product):
        return []
    node: object = others[0]
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        chain.append(node)
        if node in match.named:
            fits = match.attachment.adapter(match.named[node]) is None and _alike(product, masked, node)
            return chain if fits and not _rewritten_between(node, product) else []
        node = node.args[0] if is_reshape(node) else None
    return []


def _alike(product: fx.Node, masked: fx.Node, up: fx.Node) -> bool:
    """Whether the product neither broadcasts nor casts."""
    shapes = [shape_of(product), shape_of(masked)]
    if len({dtype_of(node) for node in (product, masked, up)}) != 1 or any(shape is None for shape in shapes):
        return False
    first, second = (tuple(shape or ()) for shape in shapes)
    return len(first) == len(second) and all(statically_equal(a, b) for a, b in zip(first, second, strict=True))


def _rewritten_between(up: fx.Node, product: fx.Node) -> bool:
    """Whether an input of up's linear is written between up and the product, where the rewrite would read it."""
    writes = Writes()
    before: list[fx.Node | None] = []
    for node in product.graph.nodes:
        if node is up:
            before = [writes.last(source) for source in up.all_input_nodes]
        if node is product:
            break
        writes.add(node)
    return before != [writes.last(source) for source in up.all_input_nodes]


def _skip_rows(emit: Emitter, product: fx.Node, masked: fx.Node, chain: list[fx.Node], match: Match) -> None:
    """Replace the product by ``rana.masked_rows``; the last node of ``chain`` is up's linear."""
    found = operands_of(chain[-1])
    assert found is not None and isinstance(found.x, fx.Node)
    wanted, density, out_first = dtype_of(product), match.adapter.density, found.out_first

    def hidden(x: Any, a: Any, matrix: Any, bias: Any) -> Any:
        weight = matrix if out_first else torch.t(matrix)
        return masked_rows(cast(x, wanted), a, weight, bias, density)

    h = emit.record(hidden, found.x, masked, found.matrix, found.bias)
    annotate(h, Annotation(match.adapter.name))
    product.replace_all_uses_with(h)
    for node in (product, *chain):
        product.graph.erase_node(node)


def _activated_gate(down: Linear, match: Match) -> tuple[fx.Node, fx.Node] | None:
    """(the product that the down projection reads, its factor that comes from the gate), or None."""
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
    """Names of the linears that a chain of pointwise operations starts from."""

    def sources(current: fx.Node) -> Iterable[fx.Node]:
        links = current not in named and is_call(current) and (is_pointwise(current) or is_row_view(current))
        return tensor_inputs(current) if links else ()

    return {named[found] for found in walk([node], sources) if found in named}
