"""Products with weights that are not linears, with the reasons: reported instead of adapted.

In: a node that is not a linear (rana_fx.graph.linears), and the nodes of the graph that depend on no data. Out: a ``Skip`` for
every weight of more than one dimension that is an operand of the node: experts, convolutions, fused operators, graphs that an
operator calls, weights that are computed, quantised, or multiplied from the left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import fx, nn

from rana_fx.formats import is_plain
from rana_fx.graph.dataflow import tensor_inputs, value_of
from rana_fx.graph.effects import bodies_of, multiplies
from rana_fx.graph.functionalize import Writes
from rana_fx.graph.matmuls import Operands
from rana_fx.graph.names import source_name
from rana_fx.graph.operands import Operand, operand
from rana_fx.graph.ops import CASTS, CLOSED, COPIES, INDEXING, MOVEMENT, TRANSPOSES, is_call, op_name, opaque
from rana_fx.skips import Skip

COMPUTED = "its weight is computed in the forward pass"


class Unadapted:
    """Classifies the products of one graph that are not linears.

    Args:
        weights: graph inputs that are Parameters.
        constant: nodes that depend on no data -> the weights that they are computed from, products excluded (``constants``).
        origins: the same, with the weights that enter through a product.
        name_of: a graph input that is a Parameter -> its site.
    """

    def __init__(
        self,
        weights: Mapping[fx.Node, nn.Parameter],
        constant: Mapping[fx.Node, set[fx.Node]],
        origins: Mapping[fx.Node, set[fx.Node]],
        name_of: Callable[[fx.Node], str],
    ) -> None:
        self._weights, self._constant, self._origins, self._name_of = weights, constant, origins, name_of
        self.computed: list[fx.Node] = []  # matrices of linears that are computed from weights, so far

    def skips(self, node: fx.Node, operands: Operands | None) -> list[Skip]:
        """The weights of a product that is not a linear, each with the reason."""
        unknown = opaque(node)
        if unknown is not None:
            return self._expert(node) or self._all(node, f"inside an operator whose parts are not known ({unknown})")
        if not multiplies(node):
            return []
        name = op_name(node)
        bodies = bodies_of(node)
        if bodies:
            return self._inside(node, [body for _, body in bodies])
        if any(word in name for word in CLOSED):
            return self._all(node, f"inside a fused operator ({name})")
        if is_convolution(node):
            return self._all(node, f"a convolution ({name})")
        if name == "bilinear":
            return self._all(node, f"a product of two activations with a weight ({name})")
        if "attention" in name:
            return []  # a product of activations; one of them may be learned
        return self._expert(node) or self._computed(node, operands)

    def _all(self, node: fx.Node, reason: str) -> list[Skip]:
        """All weights of an operator that is not decomposed."""
        leaves = (leaf for source in node.all_input_nodes for leaf in self._constant.get(source, ()))
        return [Skip(self._name_of(leaf), reason) for leaf in leaves if self._weights[leaf].dim() > 1]

    def _inside(self, node: fx.Node, bodies: list[fx.GraphModule]) -> list[Skip]:
        """The weights that are multiplied in the graphs of an operator that does not call them exactly once."""
        reason = f"inside {op_name(node)}, whose graphs are not rewritten"
        known = {source: leaf for source in node.all_input_nodes for leaf in self._constant.get(source, ())}
        return [Skip(self._name_of(leaf), reason) for leaf in _multiplied(bodies, known) if self._weights[leaf].dim() > 1]

    def _expert(self, node: fx.Node) -> list[Skip]:
        """A matmul with a weight of three dimensions (experts), or any use of a quantised matrix."""
        for source in node.all_input_nodes:
            found = self._through_indexing(source)
            if found is None:
                continue
            parameter = self._weights[found]
            site = self._name_of(found)
            if parameter.dim() == 3:
                count, *matrix = parameter.shape
                kind = f"3-D weight, as of experts: {count} matrices of {tuple(matrix)} ({op_name(node)})"
                return [Skip(site, f"{kind}; not adapted, not in the budget")]
            if not is_plain(parameter):
                return [Skip(site, f"quantised weight ({parameter.dtype})")]
        return []

    def _computed(self, node: fx.Node, operands: Operands | None) -> list[Skip]:
        """A product of an activation with a matrix computed from Parameters alone, or a product from the left."""
        inputs = list(tensor_inputs(node))
        if all(item in self._constant for item in inputs):
            return []  # depends on no data: not a layer
        matrix = operands.matrix if operands is not None else None
        if isinstance(matrix, fx.Node) and matrix in self._constant and not self._constant[matrix]:
            return self._made_of_weights(matrix)
        found = [self._largest(item) for item in inputs]
        sites = list(dict.fromkeys(self._name_of(leaf) for leaf in found if leaf is not None))
        shown = [operand(item, self._weights) for item in inputs]
        if any(isinstance(one, Operand) and one.value.dim() > 1 for one in shown):
            reason = f"its product with the activation is not one over the last dimension ({op_name(node)})"
            return [Skip(site, reason) for site in sites]
        return [Skip(site, COMPUTED) for site in sites]

    def _largest(self, item: fx.Node) -> fx.Node | None:
        leaves = [leaf for leaf in self._constant.get(item, ()) if self._weights[leaf].dim() > 1]
        return max(leaves, key=lambda leaf: self._weights[leaf].numel(), default=None)

    def _made_of_weights(self, matrix: fx.Node) -> list[Skip]:
        """A matrix that is a product of Parameters. A product of more than two dimensions (heads, positions) is an activation."""
        value = value_of(matrix)
        if not isinstance(value, torch.Tensor) or value.dim() != 2:
            return []
        leaves = [leaf for leaf in self._origins[matrix] if self._weights[leaf].dim() > 1]
        if not leaves:
            return self._buffer(matrix)
        self.computed.append(matrix)
        return [Skip(self._name_of(leaf), COMPUTED) for leaf in leaves]

    def _buffer(self, matrix: fx.Node) -> list[Skip]:
        source = matrix
        while is_call(source) and op_name(source) in MOVEMENT | CASTS and source.args and isinstance(source.args[0], fx.Node):
            source = source.args[0]
        found = source.op in ("placeholder", "get_attr")
        return [Skip(source_name(source), "its matrix is a buffer, and no Parameter")] if found else []

    def _through_indexing(self, node: fx.Node) -> fx.Node | None:
        """The Parameter that a node is a cast, a transpose, a copy or an indexing of; None where there is none."""
        while node not in self._weights:
            if not is_call(node) or op_name(node) not in TRANSPOSES | CASTS | INDEXING | COPIES:
                return None
            if not node.args or not isinstance(node.args[0], fx.Node):
                return None
            node = node.args[0]
        return node


def is_convolution(node: fx.Node) -> bool:
    """Whether a node is a convolution."""
    return is_call(node) and op_name(node).lstrip("_").startswith(("conv1d", "conv2d", "conv3d", "conv_", "convolution"))


def _multiplied(bodies: Sequence[fx.GraphModule], operands: Mapping[fx.Node, fx.Node]) -> Iterator[fx.Node]:
    """Weights that are operands of a product in a body. ``operands``: operands of the operator -> the weight they come from.

    An input of a body is identified with a weight where both share memory.
    """
    writes = Writes()
    for body in bodies:
        held: dict[fx.Node, fx.Node] = {}
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                found = next((leaf for source, leaf in operands.items() if writes.shares(inner, source)), None)
            else:
                sources = [source for source in inner.all_input_nodes if source in held]
                found = held[sources[0]] if sources and op_name(inner) in TRANSPOSES | CASTS | INDEXING | COPIES else None
                if multiplies(inner):
                    yield from (held[source] for source in sources)
            if found is not None:
                held[inner] = found
