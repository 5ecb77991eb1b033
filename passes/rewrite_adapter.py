"""Replace linears that have an adapter by what it computes: ``rana_fx.apply.apply``, recorded.

    q = linear(x, w_q); k = linear(x, w_k); v = linear(x, w_v)
  becomes, with a rank adapter of all three,
    z = rana.router(x, B); y = rana.masked_gemv(z, tau, At, c); q, k, v = y[..., :a], y[..., a:b], y[..., b:]

An adapter that reads the model's own weight is recorded at each of its linears, since the model may compute the operand from the
weight just before; any other one at the first of its linears. Products of gated adapters are recorded here, too, their masks in
rewrite_gated.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from rana_fx.apply import Target, apply, spans
from rana_fx.graph.linears import Linear
from rana_fx.passes.base import Declined, PassResult
from rana_fx.passes.emit import Annotation, Emitter, Factors, annotate, dtype_of
from rana_fx.passes.match import Match, gradients_flow

_REFUSED = "its adapter does not take what it reads here ({error}): it runs dense"


def rewrite_adapter(graph_module: fx.GraphModule, match: Match) -> PassResult:
    """Rewrite one match."""
    if match.adapter.kind == "gated":
        return PassResult()
    together = [(linear,) for linear in match.linears] if match.adapter.reads_model else [match.linears]
    results = [replace(graph_module, match, linears) for linears in together]
    return PassResult(sum(found.count for found in results), tuple(place for found in results for place in found.declined))


def replace(graph_module: fx.GraphModule, match: Match, linears: Sequence[Linear], *, mask: fx.Node | None = None) -> PassResult:
    """Replace linears that read one tensor by the adapter's outputs, computed before the first.

    Args:
        mask: of a gated adapter, which neurons of each token to keep, as many as x has elements; None where x is zero elsewhere.

    Returns:
        The number of linears; or each of them as declined, where the operations of the adapter refuse the tensor.
    """
    first = linears[0]
    emit = Emitter(graph_module, first.node)

    columns = spans(match.adapter, {record.name: record.out_features for record in match.attachment.plan.sites})
    every_row = gradients_flow(match, first.node)

    def observe(part: str, output: Any, _: Any) -> None:
        annotate(output.node, Annotation(match.adapter.name, part))

    def outputs(x: Any, operands: Any, mask: Any) -> Any:
        targets = [
            Target(linear.name, columns[linear.name], weight, bias, dtype_of(linear.node), linear.factor[1])
            for linear, (weight, bias) in zip(linears, operands, strict=True)
        ]
        gate = None if mask is None else mask.reshape_as(x)
        return apply(match.adapter, Factors(emit, match), x, targets, gate=gate, every_row=every_row, observe=observe)

    try:
        outs = emit.record(outputs, first.x, [(linear.factor[0], linear.bias_node) for linear in linears], mask)
    except (RuntimeError, TypeError, ValueError) as error:  # what rules of shapes and dtypes raise
        for node in reversed(emit.record.made):
            graph_module.graph.erase_node(node)
        reason = _REFUSED.format(error=str(error).strip().partition("\n")[0])
        return PassResult(0, tuple(Declined(linear.name, reason) for linear in linears))
    for linear, out in zip(linears, outs, strict=True):
        linear.node.replace_all_uses_with(out)
        graph_module.graph.erase_node(linear.node)
    return PassResult(len(linears))
