"""Zero the activated gate where it is small, as CATS does, and skip the rows of up and down that these zeros multiply.

    y = linear(act(linear(x, w_gate)) * linear(x, w_up), w_down)
  becomes
    a = act(linear(x, w_gate)); a = where(a^2 >= tau, a, 0)
    h = rana.masked_rows(x, a, w_up); y = rana.masked_gemv(h, 0+, w_down.t())

tau is one number, or one for each neuron. The cost of a decoded token is then the one that the plan counts. Both operations
multiply by the model's own weights. Up is left dense, and only down skips rows, where up's linear has an adapter of its own or
other users (a stacked gate and up), or is not the only other factor of the product; where a tensor is written in between; and
where gradients flow: tokens are then many, and up would have to be recomputed in the backward pass.

Operations between the product and down that keep zeros (dropout, casts, scales) change nothing of this. Behind other operations
the gate is masked and all rows of down are read. Where the product has further users, the input of down is masked instead of the
gate. Where the product is not found in this graph, down is dense. ``PassResult.declined`` has the reasons.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from rana_fx.apply import cast, gate_mask
from rana_fx.graph.dataflow import is_reshape, shape_of, statically_equal, value_of
from rana_fx.graph.effects import written
from rana_fx.graph.functionalize import Writes
from rana_fx.graph.linears import Linear
from rana_fx.graph.matmuls import operands_of
from rana_fx.graph.ops import op_name
from rana_fx.kernels.ops import masked_rows
from rana_fx.kernels.reference import kept
from rana_fx.passes.base import Declined, PassResult
from rana_fx.passes.emit import Annotation, Emitter, Factors, annotate, dtype_of
from rana_fx.passes.gated_product import find_product
from rana_fx.passes.match import Match, gradients_flow
from rana_fx.passes.rewrite_adapter import replace

_DENSE = "its input is not the product of its gate with up in this graph, or not in a form that is known: it runs dense"
_SHARED = "the product with its gate is read by others as well, and in another form: it runs dense"
_ALL_ROWS = "behind the product with its gate, {operation} makes other numbers of zeros: the gate is masked, and no row skipped"
_UP_SHARED = "it, or its product with the gate, is read by others as well: no row of it is skipped"
_UP_OTHER = "its product with the gate is in another form (broadcast, scaled, cast or written in place): no row of it is skipped"


def rewrite_gated(graph_module: fx.GraphModule, match: Match) -> PassResult:
    """Rewrite one match."""
    if match.adapter.kind != "gated":
        return PassResult()
    results = [_rewrite(graph_module, match, linear) for linear in match.linears]
    return PassResult(sum(found.count for found in results), tuple(place for found in results for place in found.declined))


def _rewrite(graph_module: fx.GraphModule, match: Match, down: Linear) -> PassResult:
    product = find_product(down, match)
    if product is None:
        return PassResult(0, (Declined(down.name, _DENSE),))
    emit = Emitter(graph_module, product.reader)
    if not product.read_by(linear.node for linear in match.linears):
        if product.changes_zeros is not None or not product.rows_stay:
            return PassResult(0, (Declined(down.name, _SHARED),))
        mask = emit.record(kept, product.gate, Factors(emit, match)["tau"].node)
        made = replace(graph_module, match, [down], mask=mask)
        return PassResult(made.count, (*made.declined, *_left(match, _UP_SHARED)))
    masked = emit.call(gate_mask, product.gate, Factors(emit, match)["tau"].node)
    annotate(masked, Annotation(match.adapter.name))
    product.reader.replace_input_with(product.gate, masked)
    factor = masked if product.reader is product.node else product.factor
    left = _skip_rows_of_up(graph_module, product.node, factor, match)
    if product.changes_zeros is None:
        made = replace(graph_module, match, [down])
        return PassResult(made.count, (*made.declined, *left))
    _keep_bias(graph_module, match, down)
    reason = _ALL_ROWS.format(operation=op_name(product.changes_zeros))
    return PassResult(0, (Declined(down.name, reason), *left))


def _keep_bias(graph_module: fx.GraphModule, match: Match, down: Linear) -> None:
    """Apply the bias of the adapter, which approximates the masked terms and is valid only together with the mask."""
    if match.adapter.bias is None:
        return
    emit, (matrix, transposed) = Emitter(graph_module, down.node), down.factor

    def output(x: Any, matrix: Any, bias: Any) -> Any:
        return torch.nn.functional.linear(x, torch.t(matrix) if transposed else matrix, bias)

    y = emit.record(output, down.x, matrix, Factors(emit, match)["bias"].node)
    down.node.replace_all_uses_with(y)
    graph_module.graph.erase_node(down.node)


# ---- up


def _left(match: Match, reason: str) -> tuple[Declined, ...]:
    return tuple(Declined(name, reason) for name in match.adapter.also)


def _skip_rows_of_up(graph_module: fx.GraphModule, product: fx.Node, masked: fx.Node, match: Match) -> tuple[Declined, ...]:
    """Replace a product by ``rana.masked_rows`` where its other factor is up's linear; else return the reason why not.

    Nothing is declined where up has an adapter of its own or gradients flow: all rows of up are needed then.
    """
    if gradients_flow(match, product) or any(match.attachment.adapter(name) is not None for name in match.adapter.also):
        return ()
    chain = _chain_to_up(product, masked, match)
    if isinstance(chain, str):
        return _left(match, chain)
    _skip_rows(Emitter(graph_module, product), product, masked, chain, match)
    return ()


def _chain_to_up(product: fx.Node, masked: fx.Node, match: Match) -> list[fx.Node] | str:
    """The other factor of the product and its chain of reshapes, ending at up's linear; or the reason why up must stay dense."""
    others = [node for node in product.args if node is not masked]
    value = value_of(product)
    if len(others) != 1 or product.kwargs or written(product) or not isinstance(value, torch.Tensor):
        return _UP_OTHER
    node: object = others[0]
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node):
        if len(node.users) != 1:
            return _UP_SHARED
        chain.append(node)
        if node in match.named:
            fits = match.attachment.adapter(match.named[node]) is None and _alike(product, masked, node)
            return chain if fits and not _rewritten_between(node, product) else _UP_OTHER
        node = node.args[0] if is_reshape(node) else None
    return _UP_OTHER


def _alike(product: fx.Node, masked: fx.Node, up: fx.Node) -> bool:
    """Whether the product neither broadcasts nor casts."""
    shapes = [shape_of(product), shape_of(masked)]
    if len({dtype_of(node) for node in (product, masked, up)}) != 1 or any(shape is None for shape in shapes):
        return False
    first, second = (tuple(shape or ()) for shape in shapes)
    return len(first) == len(second) and all(statically_equal(a, b) for a, b in zip(first, second, strict=True))


def _rewritten_between(up: fx.Node, product: fx.Node) -> bool:
    """Whether an input of up's linear is written between up and the product, where the rewrite would read it."""
    between = itertools.takewhile(lambda node: node is not product, _from(up))
    if not any(written(node) for node in between):
        return False  # without a look at the graph in front of the block, which has many
    writes = Writes()
    before: list[fx.Node | None] = []
    for node in product.graph.nodes:
        if node is up:
            before = [writes.last(source) for source in up.all_input_nodes]
        if node is product:
            break
        writes.add(node)
    return before != [writes.last(source) for source in up.all_input_nodes]


def _from(node: fx.Node) -> Iterator[fx.Node]:
    """A node and those behind it, in the order of the graph."""
    while node.op != "root":
        yield node
        node = node.next


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
