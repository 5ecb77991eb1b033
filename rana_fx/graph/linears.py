"""Find every linear layer of a traced graph by dataflow.

In: one FX graph and the real Parameters behind its inputs. Out: a ``Linear`` for every product of an activation with a
matrix from a Parameter (``linear``, ``addmm`` with an (in, out) weight, ``matmul``/``mm`` with a transposed weight, a
2-D ``einsum``), and a ``Skip`` with its reason for every weight that takes part in a product that is not one of these.
A weight is recognised by identity, through views; names come from the model or from Dynamo's source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from rana_fx.formats import is_plain
from rana_fx.graph.dataflow import op_name, reads_values, row_source, tensor_inputs, value_of
from rana_fx.graph.functionalize import Writes, written
from rana_fx.graph.operands import CASTS, INDEXING, TRANSPOSES, Operand, operand
from rana_fx.skips import Skip as Skip

DEVICES = ("cpu", "cuda", "xpu")  # where Inductor lowers the rewritten graph
_CLOSED = ("multi_head_attention_forward", "encoder_layer_fwd")  # where rana_fx.graph.decompose_fused could not open it
_PRODUCTS = ("mm", "matmul", "einsum", "linear", "bmm")


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
        found = operands_of(self.node)
        assert found is not None and isinstance(found[0], fx.Node)
        return found[0]

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
        found = operands_of(self.node)
        assert found is not None and isinstance(found[1], fx.Node)
        return found[1], not found[3]


@dataclass
class Scan:
    """What one graph holds."""

    linears: list[Linear] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    weights: dict[fx.Node, nn.Parameter] = field(default_factory=dict)
    constant: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)  # see ``constants``
    products: set[fx.Node] = field(default_factory=set)  # nodes that multiply an activation by a weight, linears or not


def parameters_of(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> dict[fx.Node, nn.Parameter]:
    """Graph inputs that are Parameters: placeholders (Dynamo) and get_attr nodes (exported programs)."""
    found: dict[fx.Node, nn.Parameter] = {}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, example_inputs, strict=False):
        if isinstance(value, nn.Parameter):
            found[node] = value
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
    source = getattr(node, "_dynamo_source", None)
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
    writes = Writes()
    seen: set[str] = set()
    for node in graph_module.graph.nodes:
        writes.add(node)
        if node.op not in ("call_function", "call_method"):
            continue
        match = _match(node, scan.weights, names, scan.constant, writes)
        if match is None and any(word in op_name(node) for word in _CLOSED):
            for source in node.all_input_nodes:
                for leaf in scan.constant.get(source, ()):
                    if scan.weights[leaf].dim() > 1:
                        scan.products.add(node)
                        scan.skips.append(Skip(_name(leaf, scan.weights, names), f"inside a fused operator ({op_name(node)})"))
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

    The output of a constant product (keys of a table of positions) holds no weight: it is an activation that never changes.
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
        elif node.op in ("call_function", "call_method") and all(item in found for item in node.all_input_nodes):
            held = set().union(*(found[item] for item in node.all_input_nodes))
            found[node] = set() if _multiplies(op_name(node)) else held
    return found


def _match(
    node: fx.Node,
    weights: Mapping[fx.Node, nn.Parameter],
    names: Mapping[int, str],
    constant: Mapping[fx.Node, set[fx.Node]],
    writes: Writes,
) -> Linear | Skip | None:
    name = op_name(node)
    operands = operands_of(node)
    if operands is None:
        return _expert(node, name, weights, names) or _computed(node, name, weights, names, constant)
    x, weight, bias, wants_transposed = operands
    found = operand(weight, weights)
    if found is None or (isinstance(found, Operand) and found.value.dim() != 2):
        return _expert(node, name, weights, names) or _computed(node, name, weights, names, constant)
    if isinstance(found, str):
        assert isinstance(weight, fx.Node)
        origin = _origin(weight, weights)
        return Skip(_name(origin, weights, names), _unsupported(node, x, weights[origin]) or found)
    site = _name(found.source, weights, names) + found.part
    reason = _unsupported(node, x, found.parameter)
    bias_value = None
    if bias is not None and reason is None:
        bias_found = operand(bias, weights)
        if not isinstance(bias_found, Operand) or bias_found.value.dim() != 1:
            cast = isinstance(bias_found, str)
            reason = "its bias is cast in the forward pass" if cast else "its bias is an activation or is computed"
        else:
            bias_value = bias_found.value
    if reason is not None:
        return Skip(site, reason)
    assert isinstance(x, fx.Node)
    # linear multiplies by W^T of an (out, in) operand; the others by the operand itself, (in, out)
    matrix = found.value if wants_transposed else found.value.t()
    transposed = found.flipped if wants_transposed else not found.flipped
    whole = not found.part and found.parameter.dim() == 2
    return Linear(
        node, found.parameter, found.source, matrix, transposed, whole, bias_value, bias, site, writes.last(x)
    )  # fmt: skip


def _multiplies(name: str) -> bool:
    return any(name.endswith(word) for word in _PRODUCTS)


def _origin(node: fx.Node, weights: Mapping[fx.Node, nn.Parameter]) -> fx.Node:
    while node not in weights:
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def _name(node: fx.Node, weights: Mapping[fx.Node, nn.Parameter], names: Mapping[int, str]) -> str:
    return names.get(id(weights[node])) or source_name(node)


def operands_of(node: fx.Node) -> tuple[object, object, fx.Node | None, bool] | None:
    """(x, weight operand, bias, operand is (out, in)?) of a product that may be a linear."""
    name = op_name(node)
    if name == "linear":
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        x = node.args[0] if node.args else node.kwargs.get("input")
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        return x, weight, bias if isinstance(bias, fx.Node) else None, True
    if name == "addmm" and len(node.args) >= 3:
        bias = node.args[0]
        return node.args[1], node.args[2], bias if isinstance(bias, fx.Node) else None, False
    if name in ("matmul", "mm") and len(node.args) >= 2:
        return node.args[0], node.args[1], None, False
    if name == "einsum":
        return _einsum(node)
    return None


def _einsum(node: fx.Node) -> tuple[object, object, fx.Node | None, bool] | None:
    """``...i,oi->...o`` or ``...i,io->...o``: a linear written as an einsum; anything else is not one."""
    equation = node.args[0]
    operands = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    x, weight = operands
    if len(right) != 2 or len(left) < 2 or len(set(left)) != len(left) or "." in right:
        return None
    contracted = left[-1]
    kept = right.replace(contracted, "")
    if contracted not in right or len(kept) != 1 or output != left[:-1] + kept or kept in left:
        return None
    return x, weight, None, right[1] == contracted


def _unsupported(node: fx.Node, x: object, weight: nn.Parameter) -> str | None:
    if not isinstance(x, fx.Node):
        return "its input is not a tensor of the graph"
    if type(weight) is not nn.Parameter:
        return f"quantised or wrapped weight ({type(weight).__name__})"
    if not is_plain(weight):
        return f"quantised weight ({weight.dtype})"
    if weight.device.type not in DEVICES:
        return f"unsupported device {weight.device.type} (supported: {', '.join(DEVICES)})"
    if op_name(node) == "addmm" and any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return "addmm with alpha or beta other than 1"
    return None


def _expert(node: fx.Node, name: str, weights: Mapping[fx.Node, nn.Parameter], names: Mapping[int, str]) -> Skip | None:
    """A product with a weight of three dimensions (experts), or any use of a quantised matrix."""
    if not any(word in name for word in _PRODUCTS):
        return None
    for source in node.all_input_nodes:
        found = _through_indexing(source, weights)
        if found is None:
            continue
        parameter = weights[found]
        site = _name(found, weights, names)
        if parameter.dim() == 3:
            count, *matrix = parameter.shape
            return Skip(
                site,
                f"3-D weight, as of experts: {count} matrices of {tuple(matrix)} ({name}); not adapted, not in the budget",
            )
        if not is_plain(parameter):
            return Skip(site, f"quantised weight ({parameter.dtype})")
    return None


def _computed(
    node: fx.Node,
    name: str,
    weights: Mapping[fx.Node, nn.Parameter],
    names: Mapping[int, str],
    constant: Mapping[fx.Node, set[fx.Node]],
) -> Skip | None:
    """A product of data with what is computed from Parameters alone, or from the left: reported, not adapted."""
    if not _multiplies(name):
        return None
    inputs = list(tensor_inputs(node))
    if all(item in constant for item in inputs):
        return None  # depends on no data: computed once, not a layer
    matrices = [(weights[leaf].numel(), leaf) for item in inputs for leaf in constant.get(item, ()) if weights[leaf].dim() > 1]
    if not matrices:
        return None
    leaf = max(matrices, key=lambda pair: pair[0])[1]
    site = _name(leaf, weights, names)
    if any(isinstance(found, Operand) and found.value.dim() > 1 for found in (operand(item, weights) for item in inputs)):
        return Skip(site, f"its product with the activation is not one over the last dimension ({name})")
    return Skip(site, "its weight is computed in the forward pass")


def _through_indexing(node: fx.Node, weights: Mapping[fx.Node, nn.Parameter]) -> fx.Node | None:
    for _ in range(8):
        if node in weights:
            return node
        if node.op not in ("call_function", "call_method") or op_name(node) not in TRANSPOSES | CASTS | INDEXING | {
            "contiguous",
            "detach",
            "alias",
            "clone",
        }:
            return None
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return None
