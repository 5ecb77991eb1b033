"""Replace rana operations by plain PyTorch where a ``torch.func`` transform differentiates or vectorises them.

    _vmap_increment_nesting(...); y = rana.masked_gemv(v, tau, w, bias, scale, density); ...
  becomes
    _vmap_increment_nesting(...); y = reference.masked_gemv(v, tau, w, bias, scale); ...

In: a rewritten Dynamo graph. Out: the same graph, in which rana operations inside a transform are calls of kernels/reference.py:
a selection and a dense matmul, which have all derivatives and batching rules of PyTorch. The plan is applied with the same
results; no rows are skipped, as for a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from rana_fx.graph.transforms import is_plumbing, transformed
from rana_fx.kernels import ops, reference
from rana_fx.passes.base import Declined, PassResult, PreGrad
from rana_fx.passes.match import Matches

_WRAPPED = "a transform of torch.func wraps its weight, such as torch.func.grad by parameters: the dense linear is differentiated"
_PLAIN: dict[object, Callable[..., Any]] = {
    ops.masked_gemv: reference.masked_gemv,
    ops.masked_rows: reference.masked_rows,
    ops.router: reference.router,
}


def decompose_transformed(graph_module: fx.GraphModule, context: PreGrad) -> PassResult:
    """Counts the operations replaced; declines planned weights that a transform wraps, for a gradient or a batch of them."""
    inside = transformed(graph_module.graph)
    count = 0
    for node in graph_module.graph.nodes:
        if node in inside and node.target in _PLAIN:
            op = str(node.target).split(".")[1]
            given = ops.without_density(ops.arguments_of(op, node.args, node.kwargs))
            node.target, node.args, node.kwargs = _PLAIN[node.target], tuple(given), {}
            count += 1
    return PassResult(count, tuple(_wrapped_weights(context.matches)))


def _wrapped_weights(matches: Matches) -> Iterator[Declined]:
    for node, weight in matches.scan.weights.items():
        if not any(is_plumbing(user) for user in node.users):
            continue
        for attachment in matches.attachments:
            name = attachment.names.get(id(weight))
            if name is not None and attachment.adapter(name) is not None:
                yield Declined(name, _WRAPPED)
