"""Find every linear layer of a traced graph by dataflow.

In: one FX graph and the real Parameters behind its inputs. Out: a ``Linear`` for every matmul of an activation with a
matrix from a Parameter (``linear``, ``addmm`` with an (in, out) weight, ``matmul``/``mm`` with a transposed weight, a
2-D ``einsum``), and a ``Skip`` with its reason for every weight that takes part in a matmul that is not one of these.
A weight is recognised by identity, through views; names come from the model or from Dynamo's source.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from rana_fx.formats import is_plain
from rana_fx.graph.dataflow import ancestors, reads_values, row_source, value_of
from rana_fx.graph.effects import written
from rana_fx.graph.functionalize import Writes
from rana_fx.graph.matmuls import Operands, operands_of
from rana_fx.graph.names import attribute_at
from rana_fx.graph.names import site_name as site_name
from rana_fx.graph.names import source_name as source_name
from rana_fx.graph.names import source_text as source_text
from rana_fx.graph.operands import Operand, operand
from rana_fx.graph.ops import is_call, is_matmul, op_name
from rana_fx.graph.real_values import real_value
from rana_fx.graph.unadapted import COMPUTED, Unadapted, is_convolution
from rana_fx.ordinary import is_ordinary, wrapped
from rana_fx.skips import Skip as Skip

DEVICES = ("cpu", "cuda", "xpu")  # where Inductor lowers the rewritten graph


@dataclass(frozen=True, eq=False)
class Linear:
    """One occurrence of a linear layer in one graph: ``node = x @ matrix^T + bias``."""

    node: fx.Node
    weight: nn.Parameter
    weight_node: fx.Node  # the graph input
    matrix: torch.Tensor  # (out, in): a view of the weight, which may be a part of it
    transposed: bool  # the Parameter is stored (in, out)
    whole: bool  # the matrix is the whole Parameter, as it is or transposed
    bias: torch.Tensor | None
    bias_node: fx.Node | None
    name: str
    version: Hashable = None  # key of the values of x at this linear (``Writes.version``)

    @property
    def x(self) -> fx.Node:
        """The tensor it reads now: a rewrite of another layer may have put another node there."""
        x = self._operands.x
        assert isinstance(x, fx.Node)
        return x

    @property
    def op(self) -> str:
        return op_name(self.node)

    @property
    def out_features(self) -> int:
        return self.matrix.shape[0]

    @property
    def in_features(self) -> int:
        return self.matrix.shape[1]

    @property
    def source(self) -> tuple[fx.Node, Hashable]:
        """The tensor read, row views removed, and its version: linears with one ``source`` can share a router."""
        return row_source(self.x), self.version

    @property
    def factor(self) -> tuple[fx.Node, bool]:
        """The node it multiplies by, and whether that is (in, out)."""
        found = self._operands
        assert isinstance(found.matrix, fx.Node)
        return found.matrix, not found.out_first

    @property
    def _operands(self) -> Operands:
        found = operands_of(self.node)
        assert found is not None
        return found


@dataclass
class Scan:
    """What one graph holds."""

    linears: list[Linear] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    weights: dict[fx.Node, nn.Parameter] = field(default_factory=dict)
    constant: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)  # see ``constants``
    products: set[fx.Node] = field(default_factory=set)  # nodes that multiply an activation by a weight, linears or not
    convolutions: set[fx.Node] = field(default_factory=set)  # nodes that convolve with a weight
    unseen: set[fx.Node] = field(default_factory=set)  # nodes that read memory written through another alias


def parameters_of(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> dict[fx.Node, nn.Parameter]:
    """Graph inputs that are Parameters: placeholders (Dynamo) and get_attr nodes (exported programs).

    A fake tensor that represents a Parameter stays fake where the Parameter cannot be found (``rana_fx.graph.real_values``).
    """
    found: dict[fx.Node, nn.Parameter] = {}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, example_inputs, strict=False):
        real = real_value(node, value)
        if isinstance(real, nn.Parameter):
            found[node] = real
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = attribute_at(graph_module, node.target)
            if isinstance(value, nn.Parameter):
                found[node] = value
    return found


def find_linears(graph_module: fx.GraphModule, example_inputs: Sequence[object], names: Mapping[int, str]) -> Scan:
    """All linears of one graph in execution order. ``names``: id of a Parameter -> its name in the model."""
    scan = Scan(weights=parameters_of(graph_module, example_inputs))
    origins: dict[fx.Node, set[fx.Node]] = {}
    scan.constant = constants(graph_module, scan.weights, origins)
    matcher = _Matcher(scan, names, origins)
    skipped: dict[str, Skip] = {}
    for node in graph_module.graph.nodes:
        if any(matcher.writes.unseen(source) is not None for source in node.all_input_nodes):
            scan.unseen.add(node)
        match = matcher.match(node) if is_call(node) else ()
        matcher.writes.add(node)
        if isinstance(match, Linear):
            scan.linears.append(match)
        if isinstance(match, Linear) or match:
            (scan.convolutions if is_convolution(node) else scan.products).add(node)
        if not isinstance(match, Linear):
            for skip in match:
                skipped.setdefault(skip.site, skip)
    inside = ancestors(matcher.unadapted.computed) & {linear.node for linear in scan.linears if linear.node in scan.constant}
    for linear in [linear for linear in scan.linears if linear.node in inside]:
        scan.linears.remove(linear)
        skipped.setdefault(linear.name, Skip(linear.name, COMPUTED))
    scan.skips = list(skipped.values())
    return scan


def constants(
    graph_module: fx.GraphModule, weights: Mapping[fx.Node, nn.Parameter], origins: dict[fx.Node, set[fx.Node]] | None = None
) -> dict[fx.Node, set[fx.Node]]:
    """Tensors that no data of the batch goes into (weights, buffers, what is computed from them) -> the weights in each.

    The output of a constant matmul (keys of a table of positions) holds no weight: it is an activation that never changes.
    ``origins`` gets all weights that went into each, those of constant matmuls included.
    """
    origins = {} if origins is None else origins
    found: dict[fx.Node, set[fx.Node]] = {}
    writes = Writes()
    for node in graph_module.graph.nodes:
        writes.add(node)
        origins[node] = {node} if node in weights else set().union(*(origins[item] for item in node.all_input_nodes))
        targets = written(node)
        if targets and not all(item in found for item in node.all_input_nodes):
            # data is written into what was an empty buffer
            for item in [item for item in found if any(writes.shares(item, target) for target in targets)]:
                del found[item]
        elif node in weights:
            found[node] = {node}
        elif node.op == "get_attr" or (node.op == "placeholder" and "_buffers[" in source_text(node)):
            found[node] = set()
        elif isinstance(value_of(node), (int, float, torch.SymInt, torch.SymFloat)):
            found[node] = set()  # sizes
        elif not reads_values(node):
            found[node] = set()
        elif is_call(node) and all(item in found for item in node.all_input_nodes):
            held = set().union(*(found[item] for item in node.all_input_nodes))
            found[node] = set() if is_matmul(op_name(node)) else held
    return found


class _Matcher:
    """Decides of one node after the other whether it is a linear; ``writes`` has to follow the graph."""

    def __init__(self, scan: Scan, names: Mapping[int, str], origins: Mapping[fx.Node, set[fx.Node]]) -> None:
        self._weights, self._names = scan.weights, names
        self.writes = Writes()
        self.unadapted = Unadapted(scan.weights, scan.constant, origins, self._name)

    def match(self, node: fx.Node) -> Linear | list[Skip]:
        """The linear; or the weights in a product that cannot be adapted, empty where no weight is multiplied."""
        operands = operands_of(node)
        found = None if operands is None else operand(operands.matrix, self._weights)
        if operands is None or found is None or (isinstance(found, Operand) and found.value.dim() != 2):
            return self.unadapted.skips(node, operands)
        if isinstance(found, str):
            assert isinstance(operands.matrix, fx.Node)
            origin = self._origin(operands.matrix)
            return [Skip(self._name(origin), _unsupported(node, operands.x, self._weights[origin]) or found)]
        site = self._name(found.source) + found.part
        reason = _unsupported(node, operands.x, found.parameter) or self._changed(node, found.source)
        bias = None
        if operands.bias is not None and reason is None:
            held = operand(operands.bias, self._weights)
            if not isinstance(held, Operand) or held.value.dim() != 1:
                reason = "its bias is an activation or is computed"
                if isinstance(held, str):
                    reason = f"its bias: {held}" if held.startswith("quantised or") else "its bias is cast in the forward pass"
            else:
                bias, reason = held.value, self._changed(node, held.source)
        if reason is not None:
            return [Skip(site, reason)]
        return self._linear(node, operands, found, site, bias)

    def _changed(self, node: fx.Node, source: fx.Node) -> str | None:
        if written(node):
            return f"its result is written into an argument ({op_name(node)})"
        return None if self.writes.last(source) is None else "its weight or bias is written in the forward pass"

    def _linear(self, node: fx.Node, operands: Operands, found: Operand, site: str, bias: torch.Tensor | None) -> Linear:
        assert isinstance(operands.x, fx.Node)
        return Linear(
            node=node,
            weight=found.parameter,
            weight_node=found.source,
            matrix=found.value if operands.out_first else found.value.t(),
            transposed=found.flipped if operands.out_first else not found.flipped,
            whole=not found.part and found.parameter.dim() == 2,
            bias=bias,
            bias_node=operands.bias,
            name=site,
            version=self.writes.version(operands.x),
        )

    def _origin(self, node: fx.Node) -> fx.Node:
        while node not in self._weights:
            assert isinstance(node.args[0], fx.Node)
            node = node.args[0]
        return node

    def _name(self, node: fx.Node) -> str:
        return self._names.get(id(self._weights[node])) or source_name(node)


def _unsupported(node: fx.Node, x: object, weight: nn.Parameter) -> str | None:
    if not isinstance(x, fx.Node):
        return "its input is not a tensor of the graph"
    if not is_ordinary(weight):
        return wrapped(weight)
    if not is_plain(weight):
        return f"quantised weight ({weight.dtype})"
    if weight.device.type not in DEVICES:
        return f"unsupported device {weight.device.type} (supported: {', '.join(DEVICES)})"
    if op_name(node) in ("addmm", "addmv") and any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return f"{op_name(node)} with alpha or beta other than 1"
    return None
