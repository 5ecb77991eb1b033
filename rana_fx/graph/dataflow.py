"""Facts of FX nodes that dataflow rules are made of, and the one search over a graph.

In: nodes of a Dynamo graph (torch functions, methods) or of an exported one (aten overloads). Out: a node's fake value and
shape, whether it is a view that keeps rows whole or a slice of their columns, and which nodes lie between two others.
Everything is decided from operations (rana_fx.graph.ops) and shapes, never from module names, so that an unknown architecture
is read like a known one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx

from rana_fx.graph.ops import DROPOUT, IDENTITY, MIXING_MATMULS, PERMUTES, RESHAPES, SPLITS, VALUE_FREE, is_call, op_name


def shape_of(node: fx.Node) -> torch.Size | None:
    """Shape of the tensor this node yields under tracing (entries may be symbolic), or None."""
    value = value_of(node)
    return value.shape if isinstance(value, torch.Tensor) else None


def value_of(node: fx.Node) -> object:
    """The fake value of a node: Dynamo stores it as ``example_value``, export and AOT as ``val``."""
    return node.meta.get("example_value", node.meta.get("val"))


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
    if not is_call(node) or not node.args:
        return False
    name = op_name(node)
    if name in DROPOUT:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return training is False or bool(node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5) == 0)
    if name in IDENTITY:
        before, after = value_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None, value_of(node)
        return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype == after.dtype
    if name in RESHAPES:
        return _keeps_last(node)
    if name in PERMUTES:
        return _keeps_last(node) and _permutation_keeps_last(node)
    return False


def is_reshape(node: fx.Node) -> bool:
    """A row view that keeps the rows' number and order."""
    return is_row_view(node) and op_name(node) not in PERMUTES | {"expand"}


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
    if not is_call(node) or not node.args or op_name(node) not in SPLITS:
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
    """(a, b) of a reshape of rows of a * b columns into a rows of b columns each, such as gate and up of one linear."""
    if not is_call(node) or op_name(node) not in RESHAPES or not node.args:
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
    if not is_call(node) or len(node.args) < 2 or not isinstance(node.args[0], fx.Node):
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
    if not is_call(node) or op_name(node) != "unbind":
        return False
    return _dim_of_parts(node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0))


def _dim_of_parts(source: object, dim: object) -> bool:
    shape = shape_of(source) if isinstance(source, fx.Node) else None
    return shape is not None and isinstance(dim, int) and len(shape) >= 2 and dim % len(shape) == len(shape) - 2


def row_source(node: fx.Node) -> fx.Node:
    """The tensor that a node is a row view of, or the node. Two linears read the same tensor where their sources are one."""
    while is_row_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def mixes_tokens(node: fx.Node, weights: set[fx.Node]) -> bool:
    """A product of two activations (attention scores, attention output, or a fused attention operator)."""
    if not is_call(node):
        return False
    name = op_name(node)
    if "attention" in name or name == "flex_attention":
        return True
    if name not in MIXING_MATMULS:
        return False
    operands = [a for a in node.all_input_nodes if isinstance(value_of(a), torch.Tensor)]
    return sum(operand not in weights for operand in operands) >= 2


def reads_values(node: fx.Node) -> bool:
    """Whether the values of its inputs matter to a node, not merely their shapes."""
    return not is_call(node) or op_name(node) not in VALUE_FREE


def walk(starts: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Every node reachable from ``starts``, these included, each once, depth first.

    ``following`` is called on a node after the loop that walks has handled it, so it may depend on what the loop decided.
    """
    seen: set[fx.Node] = set()
    todo = list(starts)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(following(node))


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that any of ``nodes`` depends on, these included."""
    return set(walk(nodes, lambda node: node.all_input_nodes))


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on any of ``nodes``, these included."""
    return set(walk(nodes, lambda node: node.users))


def reach(
    start: fx.Node,
    *,
    stop: Callable[[fx.Node], bool],
    forward: bool = True,
    hidden: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
) -> tuple[set[fx.Node], set[fx.Node]]:
    """(nodes that values reach from ``start``, itself excluded; stopping nodes reached). Nothing behind these counts.

    Args:
        forward: along users; False: along inputs.
        hidden: further edges in the direction of travel (memory written under another name).
    """
    inside: set[fx.Node] = set()
    met: set[fx.Node] = set()

    def following(node: fx.Node) -> Iterator[fx.Node]:
        yield from node.users if forward else node.all_input_nodes
        yield from (hidden or {}).get(node, ())

    for node in walk(following(start), lambda node: following(node) if node in inside else ()):
        if reads_values(node):
            (met if stop(node) else inside).add(node)
    return inside, met


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs of a node that are tensors (sizes and scalars left out)."""
    for item in node.all_input_nodes:
        if isinstance(value_of(item), torch.Tensor) or item.op in ("placeholder", "get_attr"):
            yield item
