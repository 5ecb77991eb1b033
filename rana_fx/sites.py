"""Find every linear layer of a traced graph by dataflow.

In: one FX graph and the real Parameters behind its inputs. Out: a ``Linear`` for every product of an activation with a
2-D Parameter (``linear``, ``addmm`` with an (in, out) weight, ``matmul``/``mm`` with a transposed weight, a 2-D
``einsum``), and a ``Skip`` with its reason for every weight that takes part in a product that is not one of these.
A weight is recognised by identity, through transposes; names come from the model or from Dynamo's source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from rana_fx.graph import op_name, row_source, shape_of, value_of

_TRANSPOSES = {"t", "T", "mT", "transpose", "permute", "swapaxes", "swapdims", "numpy_T", "matrix_H"}
_TRANSPARENT = {"contiguous", "detach", "alias", "clone"}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "_to_copy", "type_as"}
DEVICES = ("cpu", "cuda", "xpu")  # where Inductor lowers the rewritten graph
_INDEXING = {"getitem", "index", "index_select", "select"}


@dataclass(frozen=True)
class Skip:
    """A weight or a group that is left as it is, and why."""

    site: str
    reason: str


@dataclass(frozen=True, eq=False)
class Linear:
    """One occurrence of a linear layer in one graph: ``node = x @ W^T + bias``."""

    node: fx.Node
    x: fx.Node
    weight: nn.Parameter
    weight_node: fx.Node
    transposed: bool  # the Parameter is stored (in, out)
    bias: nn.Parameter | None
    bias_node: fx.Node | None
    op: str
    name: str

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def source(self) -> fx.Node:
        """The tensor read, row views removed: linears with one ``source`` can share a router."""
        return row_source(self.x)


@dataclass
class Scan:
    """What one graph holds."""

    linears: list[Linear] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    weights: dict[fx.Node, nn.Parameter] = field(default_factory=dict)


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


def source_name(node: fx.Node) -> str:
    """Dotted name of a graph input, from Dynamo's source (relative to the compiled callable) or the attribute."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return str(node.target)
    text = source.name() if callable(source.name) else source.name
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
    return site_name(".".join(parts) or str(node.target))


def site_name(parameter_name: str) -> str:
    """A site is called after its weight, without a final ``.weight``: ``model.layers.0.mlp.up_proj``."""
    return parameter_name.removesuffix(".weight")


def find_linears(graph_module: fx.GraphModule, example_inputs: Sequence[object], names: Mapping[int, str]) -> Scan:
    """All linears of one graph in execution order. ``names``: id of a Parameter -> its name in the model."""
    scan = Scan(weights=parameters_of(graph_module, example_inputs))
    seen: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        match = _match(node, scan.weights, names)
        if isinstance(match, Linear):
            scan.linears.append(match)
        elif isinstance(match, Skip) and match.site not in seen:
            seen.add(match.site)
            scan.skips.append(match)
    return scan


def _match(node: fx.Node, weights: Mapping[fx.Node, nn.Parameter], names: Mapping[int, str]) -> Linear | Skip | None:
    name = op_name(node)
    operands = _operands(node, name)
    if operands is None:
        return _expert(node, name, weights, names)
    x, weight, bias, wants_transposed = operands
    resolved = _resolve(weight, weights)
    if resolved is None:
        return _expert(node, name, weights, names)
    weight_node, flipped, cast = resolved
    parameter = weights[weight_node]
    site = names.get(id(parameter)) or source_name(weight_node)
    # linear multiplies by W^T of an (out, in) Parameter; the others by the operand itself, (in, out)
    transposed = flipped if wants_transposed else not flipped
    reason = _unsupported(node, x, parameter, cast)
    bias_parameter = None
    if bias is not None and reason is None:
        bias_node = _resolve(bias, weights)
        if bias_node is None or weights[bias_node[0]].dim() != 1:
            reason = "its bias is an activation or is computed in the forward pass"
        elif bias_node[2]:
            reason = "its bias is cast in the forward pass"
        else:
            bias_parameter = weights[bias_node[0]]
    if reason is not None:
        return Skip(site, reason)
    assert isinstance(x, fx.Node)
    return Linear(node, x, parameter, weight_node, transposed, bias_parameter, bias, name, site)


def _operands(node: fx.Node, name: str) -> tuple[object, object, fx.Node | None, bool] | None:
    """(x, weight operand, bias, operand is (out, in)?) of a product that may be a linear."""
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


def _resolve(value: object, weights: Mapping[fx.Node, nn.Parameter]) -> tuple[fx.Node, bool, bool] | None:
    """Follow an operand to its Parameter: (graph input, transposed an odd number of times?, cast on the way?)."""
    flipped = cast = False
    while isinstance(value, fx.Node):
        if value in weights:
            return value, flipped, cast
        if value.op not in ("call_function", "call_method") or not value.args:
            return None
        name = op_name(value)
        if name in _TRANSPOSES:
            shape = shape_of(value)
            if shape is None or len(shape) != 2:
                return None
            dims = [d for d in _flat(value.args[1:]) if isinstance(d, int)]
            flipped ^= not (name == "permute" and [d % 2 for d in dims] == [0, 1])
        elif name in _CASTS:
            before, after = value_of(value.args[0]) if isinstance(value.args[0], fx.Node) else None, value_of(value)
            cast |= not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype == after.dtype)
        elif name not in _TRANSPARENT:
            return None
        value = value.args[0]
    return None


def _flat(items: Sequence[object]) -> list[object]:
    return [leaf for item in items for leaf in (item if isinstance(item, (tuple, list)) else (item,))]


def _unsupported(node: fx.Node, x: object, weight: nn.Parameter, cast: bool) -> str | None:
    if not isinstance(x, fx.Node):
        return "its input is not a tensor of the graph"
    if type(weight) is not nn.Parameter:
        return f"quantised or wrapped weight ({type(weight).__name__})"
    if not weight.dtype.is_floating_point or weight.element_size() < 2:
        return f"quantised weight ({weight.dtype})"
    if weight.device.type not in DEVICES:
        return f"unsupported device {weight.device.type} (supported: {', '.join(DEVICES)})"
    if weight.dim() != 2:
        return f"{weight.dim()}-D weight {tuple(weight.shape)}"
    if cast:
        return "its weight is cast in the forward pass"
    if op_name(node) == "addmm" and any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return "addmm with alpha or beta other than 1"
    return None


def _expert(node: fx.Node, name: str, weights: Mapping[fx.Node, nn.Parameter], names: Mapping[int, str]) -> Skip | None:
    """A product with a weight of three dimensions (experts), or any use of a quantised matrix."""
    if not any(word in name for word in ("mm", "matmul", "einsum", "linear", "bmm")):
        return None
    for operand in node.all_input_nodes:
        found = _through_indexing(operand, weights)
        if found is None:
            continue
        parameter = weights[found]
        site = names.get(id(parameter)) or source_name(found)
        if parameter.dim() == 3:
            count, *matrix = parameter.shape
            return Skip(
                site,
                f"expert weight: {count} matrices of {tuple(matrix)} chosen per token ({name}); not adapted, not in the budget",
            )
        if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
            return Skip(site, f"quantised weight ({parameter.dtype})")
    return None


def _through_indexing(node: fx.Node, weights: Mapping[fx.Node, nn.Parameter]) -> fx.Node | None:
    for _ in range(8):
        if node in weights:
            return node
        if (
            node.op not in ("call_function", "call_method")
            or op_name(node) not in _TRANSPOSES | _TRANSPARENT | _CASTS | _INDEXING
        ):
            return None
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return None
