"""What dataflow rules need to know about an FX node, whatever wrote the graph.

In: nodes of a Dynamo graph (torch functions, methods) or of an exported one (aten overloads). Out: small facts:
the operation's plain name, whether it is pointwise, a view that keeps the last dimension or a slice of it, and which
nodes lie between two others. Everything is decided from operations and shapes, never from module names, so that an
architecture nobody has seen is read like a known one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx

# names that do not change a value (at most its memory format), given the dtype stays
_IDENTITY = {
    "contiguous",
    "clone",
    "detach",
    "alias",
    "lift_fresh",
    "identity",
    "requires_grad_",
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "type",
    "type_as",
    "_to_copy",
}
_DROPOUT = {"dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"}
_RESHAPE = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "expand", "view_as", "reshape_as"}
_PERMUTE = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "t", "T", "mT"}
_SPLIT = {"chunk", "split", "tensor_split", "split_with_sizes", "unbind", "narrow", "getitem", "slice"}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy"}
# take only the shape, dtype or device of a tensor
_VALUE_FREE = {
    "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
    "randn_like", "size", "shape", "dim", "numel", "device", "dtype", "stride",
}  # fmt: skip
# products of two activations: where attention mixes tokens
_PRODUCTS = {"bmm", "baddbmm", "matmul", "mm", "einsum", "tensordot", "addbmm"}
_AUGMENTED = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "ipow": "pow",
    "imatmul": "matmul",
}


def op_name(node: fx.Node) -> str:
    """The operation's bare name: ``add`` for ``torch.add``, ``operator.iadd``, ``Tensor.add_`` and ``aten.add.Tensor``."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.split("::")[-1]
        elif target is getattr:
            name = str(node.args[1])
        else:
            name = getattr(target, "__name__", None) or str(target)
    else:
        return str(node.op)
    name = name.strip("_") if name.startswith("__") else name
    if name.endswith("_") and not name.startswith("_"):
        name = name[:-1]
    return _AUGMENTED.get(name, name)


def shape_of(node: fx.Node) -> torch.Size | None:
    """Shape of the tensor this node yields under tracing (entries may be symbolic), or None."""
    value = value_of(node)
    return value.shape if isinstance(value, torch.Tensor) else None


def value_of(node: fx.Node) -> object:
    """The fake value of a node: Dynamo stores it as ``example_value``, export and AOT as ``val``."""
    return node.meta.get("example_value", node.meta.get("val"))


@functools.cache
def _aten_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def is_pointwise(node: fx.Node) -> bool:
    """Each output element depends on the same element of the inputs (up to broadcasting); casts and dropout included."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = op_name(node)
    return name in _CASTS or name in _DROPOUT or name in _IDENTITY or _aten_pointwise(name)


def _keeps_last(node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None or not len(before) or not len(after):
        return False
    return statically_equal(before[-1], after[-1])


def statically_equal(a: object, b: object) -> bool:
    """``a == b`` for sizes that may be symbolic; an undecided comparison counts as unequal and adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def is_row_view(node: fx.Node) -> bool:
    """A view or identity after which every row (vector along the last dimension) is still a row of the source."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    name = op_name(node)
    if name in _DROPOUT:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return training is False or bool(node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5) == 0)
    if name in _IDENTITY:
        before, after = value_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None, value_of(node)
        return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype == after.dtype
    if name in _RESHAPE:
        return _keeps_last(node)
    if name in _PERMUTE:
        return name not in ("t", "T", "mT") and _keeps_last(node) and _permutation_keeps_last(node)
    return False


def is_reshape(node: fx.Node) -> bool:
    """A row view that keeps the rows' number and order."""
    return is_row_view(node) and op_name(node) not in _PERMUTE | {"expand"}


def _permutation_keeps_last(node: fx.Node) -> bool:
    shape = shape_of(node)
    assert shape is not None
    rank = len(shape)
    name = op_name(node)
    args = node.args[1:] or tuple(node.kwargs.values())
    if name == "permute":
        dims = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        return isinstance(dims[-1], int) and dims[-1] % rank == rank - 1
    return all(isinstance(dim, int) and dim % rank != rank - 1 for dim in args)


def is_column_slice(node: fx.Node) -> bool:
    """Takes some columns of the last dimension for every row: chunk, split, narrow, ``x[..., a:b]`` and their items."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in _SPLIT:
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    value = value_of(source)
    if isinstance(value, (tuple, list)):  # item of a chunk or split
        return True
    if not isinstance(value, torch.Tensor):
        return False
    return last_dim_slice(node, value.dim()) is not None


def last_dim_slice(node: fx.Node, rank: int) -> tuple[object, ...] | None:
    """Arguments (after the tensor) of a chunk/split/getitem along the last dimension, rewritten for any rank, or None."""
    name = op_name(node)
    if name == "getitem":
        index = node.args[1]
        if not isinstance(index, tuple):
            return None
        last, lead = index[-1], index[:-1]
        everything = all(item is Ellipsis or item == slice(None) for item in lead)
        reaches_last = Ellipsis in lead or len(index) == rank
        return ((Ellipsis, last),) if isinstance(last, slice) and everything and reaches_last else None
    if name in ("chunk", "split", "tensor_split", "split_with_sizes"):
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        sizes = node.args[1] if len(node.args) > 1 else next((v for k, v in node.kwargs.items() if k != "dim"), None)
        return (sizes, -1) if isinstance(dim, int) and dim % rank == rank - 1 else None
    if name in ("narrow", "slice"):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return (-1, *node.args[2:]) if isinstance(dim, int) and dim % rank == rank - 1 else None
    return None


def split_sizes(node: fx.Node) -> tuple[int, int] | None:
    """(a, b) of a reshape of rows of a * b columns into a rows of b columns each: gate and up of one linear, say."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in _RESHAPE or not node.args:
        return None
    before = shape_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    after = shape_of(node)
    if before is None or after is None or len(after) != len(before) + 1:
        return None
    *lead, a, b = after
    if not isinstance(a, int) or not isinstance(b, int) or not statically_equal(before[-1], a * b):
        return None
    return (a, b) if all(statically_equal(x, y) for x, y in zip(lead, before[:-1], strict=True)) else None


def picked_part(node: fx.Node) -> int | None:
    """The index at which a node picks one of the parts that ``split_sizes`` made."""
    if node.op not in ("call_function", "call_method") or len(node.args) < 2 or not isinstance(node.args[0], fx.Node):
        return None
    name, source, index = op_name(node), node.args[0], node.args[1]
    if name == "getitem" and isinstance(index, int):
        return index if unbinds_parts(source) else None
    shape = shape_of(source)
    if shape is None or len(shape) < 2:
        return None
    if name == "select" and len(node.args) == 3 and isinstance(node.args[2], int):
        return node.args[2] if _dim_of_parts(source, index) else None
    if name == "getitem" and isinstance(index, tuple) and len(index) >= 2 and isinstance(index[-2], int):
        lead = index[:-2]
        whole = index[-1] == slice(None) and all(item is Ellipsis or item == slice(None) for item in lead)
        return index[-2] if whole and (Ellipsis in lead or len(index) == len(shape)) else None
    return None


def unbinds_parts(node: fx.Node) -> bool:
    """An unbind of the parts that ``split_sizes`` made."""
    if node.op not in ("call_function", "call_method") or op_name(node) != "unbind":
        return False
    return _dim_of_parts(node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0))


def _dim_of_parts(source: object, dim: object) -> bool:
    shape = shape_of(source) if isinstance(source, fx.Node) else None
    return shape is not None and isinstance(dim, int) and len(shape) >= 2 and dim % len(shape) == len(shape) - 2


def row_source(node: fx.Node) -> fx.Node:
    """The tensor a node is a mere row view of: what two linears share when they 'read the same tensor'."""
    while is_row_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def mixes_tokens(node: fx.Node, weights: set[fx.Node]) -> bool:
    """A product of two activations (attention scores, attention output, or a fused attention operator)."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = op_name(node)
    if "attention" in name or name == "flex_attention":
        return True
    if name not in _PRODUCTS:
        return False
    operands = [a for a in node.all_input_nodes if isinstance(value_of(a), torch.Tensor)]
    return sum(operand not in weights for operand in operands) >= 2


def reads_values(node: fx.Node) -> bool:
    """Whether the values of its inputs matter to a node, not merely their shapes."""
    return node.op not in ("call_function", "call_method") or op_name(node) not in _VALUE_FREE


def reach(
    start: fx.Node,
    *,
    stop: Callable[[fx.Node], bool],
    forward: bool = True,
    hidden: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes reachable from ``start`` (excluded) and the stopping nodes met; traversal does not pass a stopping node.

    ``hidden``: further edges in the direction of travel (memory written under another name).
    """
    inside: set[fx.Node] = set()
    met: set[fx.Node] = set()

    def following(node: fx.Node) -> Iterator[fx.Node]:
        yield from node.users if forward else node.all_input_nodes
        yield from (hidden or {}).get(node, ())

    todo = list(following(start))
    while todo:
        node = todo.pop()
        if node in inside or node in met or not reads_values(node):
            continue
        if stop(node):
            met.add(node)
            continue
        inside.add(node)
        todo.extend(following(node))
    return inside, met


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on any of ``nodes``, these included."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.users)
    return seen


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs of a node that are tensors (sizes and scalars left out)."""
    for item in node.all_input_nodes:
        if isinstance(value_of(item), torch.Tensor) or item.op in ("placeholder", "get_attr"):
            yield item
