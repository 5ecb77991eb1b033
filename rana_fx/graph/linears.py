"""Find every linear layer of a traced graph by dataflow.

In: one FX graph and the real Parameters behind its inputs. Out: a ``Linear`` for every matmul of an activation with a
matrix from a Parameter (``linear``, ``addmm`` with an (in, out) weight, ``matmul``/``mm`` with a transposed weight, a
2-D ``einsum``), and a ``Skip`` with its reason for every weight that takes part in a matmul that is not one of these.
A weight is recognised by identity, through views; names come from the model or from Dynamo's source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from rana_fx.formats import is_plain
from rana_fx.graph.dataflow import reads_values, row_source, tensor_inputs, value_of
from rana_fx.graph.functionalize import Writes, written
from rana_fx.graph.matmuls import Operands, operands_of
from rana_fx.graph.operands import Operand, operand
from rana_fx.graph.ops import CASTS, CLOSED, COPIES, INDEXING, TRANSPOSES, contains_matmul, is_call, is_matmul, op_name
from rana_fx.graph.real_values import real_value, source_of
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
    version: fx.Node | None = None  # what last wrote into the memory of x before this linear

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
    def source(self) -> tuple[fx.Node, fx.Node | None]:
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


def parameters_of(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> dict[fx.Node, nn.Parameter]:
    """Graph inputs that are Parameters: placeholders (Dynamo) and get_attr nodes (exported programs).

    A fake tensor in the place of a Parameter stays one where its Parameter cannot be found (``rana_fx.graph.real_values``).
    """
    found: dict[fx.Node, nn.Parameter] = {}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, example_inputs, strict=False):
        real = real_value(node, value)
        if isinstance(real, nn.Parameter):
            found[node] = real
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = graph_module
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            if isinstance(value, nn.Parameter):
                found[node] = value
    return found


def source_text(node: fx.Node) -> str:
    """Dynamo's source of a graph input as it writes it, or ""."""
    source = source_of(node)
    if source is None:
        return ""
    return str(source.name() if callable(source.name) else source.name)


def source_name(node: fx.Node) -> str:
    """Dotted name of a graph input, from Dynamo's source (relative to the compiled callable) or the attribute."""
    text = source_text(node)
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
    return site_name(".".join(parts) or str(node.target))


def site_name(parameter_name: str) -> str:
    """A site is called after its weight, without a final ``.weight``: ``model.layers.0.mlp.up_proj``."""
    return parameter_name.removesuffix(".weight")


def find_linears(graph_module: fx.GraphModule, example_inputs: Sequence[object], names: Mapping[int, str]) -> Scan:
    """All linears of one graph in execution order. ``names``: id of a Parameter -> its name in the model."""
    scan = Scan(weights=parameters_of(graph_module, example_inputs))
    scan.constant = constants(graph_module, scan.weights)
    matcher = _Matcher(scan, names)
    seen: set[str] = set()
    for node in graph_module.graph.nodes:
        matcher.writes.add(node)
        if not is_call(node):
            continue
        match = matcher.match(node)
        if match is None and any(word in op_name(node) for word in CLOSED):
            hidden = matcher.hidden(node)
            scan.skips += hidden
            if hidden:
                scan.products.add(node)
        if match is not None:
            scan.products.add(node)
        if isinstance(match, Linear):
            scan.linears.append(match)
        elif isinstance(match, Skip) and match.site not in seen:
            seen.add(match.site)
            scan.skips.append(match)
    return scan


def constants(graph_module: fx.GraphModule, weights: Mapping[fx.Node, nn.Parameter]) -> dict[fx.Node, set[fx.Node]]:
    """Tensors that no data of the batch goes into (weights, buffers, what is computed from them) -> the weights in each.

    The output of a constant matmul (keys of a table of positions) holds no weight: it is an activation that never changes.
    """
    found: dict[fx.Node, set[fx.Node]] = {}
    writes = Writes()
    for node in graph_module.graph.nodes:
        writes.add(node)
        target = written(node)
        if target is not None and not all(item in found for item in node.all_input_nodes):
            # data is written into what was an empty buffer
            for item in [item for item in found if writes.root(item) is writes.root(target)]:
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

    def __init__(self, scan: Scan, names: Mapping[int, str]) -> None:
        self._weights, self._constant, self._names = scan.weights, scan.constant, names
        self.writes = Writes()

    def match(self, node: fx.Node) -> Linear | Skip | None:
        """The linear; or the weight in a matmul that cannot be adapted; or None where no weight is multiplied."""
        operands = operands_of(node)
        found = None if operands is None else operand(operands.matrix, self._weights)
        if operands is None or found is None or (isinstance(found, Operand) and found.value.dim() != 2):
            return self._expert(node) or self._computed(node)
        if isinstance(found, str):
            assert isinstance(operands.matrix, fx.Node)
            origin = self._origin(operands.matrix)
            return Skip(self._name(origin), _unsupported(node, operands.x, self._weights[origin]) or found)
        site = self._name(found.source) + found.part
        reason = _unsupported(node, operands.x, found.parameter)
        bias = None
        if operands.bias is not None and reason is None:
            held = operand(operands.bias, self._weights)
            if not isinstance(held, Operand) or held.value.dim() != 1:
                reason = "its bias is an activation or is computed"
                if isinstance(held, str):
                    reason = f"its bias: {held}" if held.startswith("quantised or") else "its bias is cast in the forward pass"
            else:
                bias = held.value
        if reason is not None:
            return Skip(site, reason)
        return self._linear(node, operands, found, site, bias)

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
            version=self.writes.last(operands.x),
        )

    def hidden(self, node: fx.Node) -> list[Skip]:
        """The weights inside an operator that could not be taken apart."""
        leaves = (leaf for source in node.all_input_nodes for leaf in self._constant.get(source, ()))
        reason = f"inside a fused operator ({op_name(node)})"
        return [Skip(self._name(leaf), reason) for leaf in leaves if self._weights[leaf].dim() > 1]

    def _expert(self, node: fx.Node) -> Skip | None:
        """A matmul with a weight of three dimensions (experts), or any use of a quantised matrix."""
        if not contains_matmul(op_name(node)):
            return None
        for source in node.all_input_nodes:
            found = self._through_indexing(source)
            if found is None:
                continue
            parameter = self._weights[found]
            site = self._name(found)
            if parameter.dim() == 3:
                count, *matrix = parameter.shape
                kind = f"3-D weight, as of experts: {count} matrices of {tuple(matrix)} ({op_name(node)})"
                return Skip(site, f"{kind}; not adapted, not in the budget")
            if not is_plain(parameter):
                return Skip(site, f"quantised weight ({parameter.dtype})")
        return None

    def _computed(self, node: fx.Node) -> Skip | None:
        """A matmul of data with what is computed from Parameters alone, or from the left: reported, not adapted."""
        if not is_matmul(op_name(node)):
            return None
        inputs = list(tensor_inputs(node))
        if all(item in self._constant for item in inputs):
            return None  # depends on no data: computed once, not a layer
        leaves = (leaf for item in inputs for leaf in self._constant.get(item, ()))
        matrices = [(self._weights[leaf].numel(), leaf) for leaf in leaves if self._weights[leaf].dim() > 1]
        if not matrices:
            return None
        site = self._name(max(matrices, key=lambda pair: pair[0])[1])
        operands = [operand(item, self._weights) for item in inputs]
        if any(isinstance(found, Operand) and found.value.dim() > 1 for found in operands):
            return Skip(site, f"its product with the activation is not one over the last dimension ({op_name(node)})")
        return Skip(site, "its weight is computed in the forward pass")

    def _through_indexing(self, node: fx.Node) -> fx.Node | None:
        """The Parameter that a node shows, cast, transposed or indexed by whatever."""
        while node not in self._weights:
            if not is_call(node) or op_name(node) not in TRANSPOSES | CASTS | INDEXING | COPIES:
                return None
            if not node.args or not isinstance(node.args[0], fx.Node):
                return None
            node = node.args[0]
        return node

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
    if op_name(node) == "addmm" and any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return "addmm with alpha or beta other than 1"
    return None
