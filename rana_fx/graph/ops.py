"""The vocabulary of operations: which names make a view, a cast, a matmul, a write.

In: FX nodes of a Dynamo graph (torch functions, methods) or of an exported one (aten overloads). Out: the operation's bare name
and sets of such names, each defined here and nowhere else. Operations of aten after autograd (Inductor's post-grad graph), which
the fusing passes read, are overloads and have sets of their own at the end.
"""

from __future__ import annotations

import functools
import operator
import types

import torch
from torch import fx

CALLS = ("call_function", "call_method")

# ---- data movement: no number changes

COPIES = {"contiguous", "clone", "detach", "alias"}
CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy"}
# do not change a value (at most its memory format), as long as the dtype stays
IDENTITY = COPIES | CASTS | {"lift_fresh", "identity"}
DROPOUT = {"dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"}

_OWN_SHAPE = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"}
RESHAPES = _OWN_SHAPE | {"expand", "view_as", "reshape_as"}
PERMUTES = {"transpose", "permute", "swapaxes", "swapdims", "movedim"}  # the dimensions are arguments
FLIPS = {"t", "T", "mT"}  # the last two dimensions
TRANSPOSES = PERMUTES | FLIPS | {"numpy_T", "matrix_H"}
SPLITS = {"chunk", "split", "tensor_split", "split_with_sizes", "unbind", "narrow", "getitem", "slice"}
LOOKUPS = {"getitem", "index", "index_select"}  # the index may be a tensor
INDEXING = LOOKUPS | {"select"}
# from a Parameter to the part of it that a matmul reads
MOVEMENT = TRANSPOSES | COPIES | SPLITS | {"select"} | _OWN_SHAPE | {"unsafe_split"}
# may share memory with their first argument
VIEWS = RESHAPES | PERMUTES | FLIPS | SPLITS | {"select", "detach", "alias", "contiguous", "to", "identity", "dropout"}

# ---- what reads no values, or writes some

# take only the shape, dtype or device of a tensor
VALUE_FREE = {
    "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
    "randn_like", "size", "shape", "dim", "numel", "device", "dtype", "stride",
}  # fmt: skip
# write into their first argument, beside functions and methods whose name ends with an underscore
IN_PLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift",
    "setitem",
}  # fmt: skip
# an operator and the function it computes
_FUNCTION_OF = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "ipow": "pow",
    "imatmul": "matmul",
}

# ---- arithmetic

SCALINGS = {"mul", "div"}
ARITHMETIC = SCALINGS | {"add", "sub"}  # linear in each operand
# where attention mixes tokens, given that both operands are activations
MIXING_MATMULS = {"bmm", "baddbmm", "matmul", "mm", "einsum", "tensordot", "addbmm"}
_MATMUL_SUFFIXES = ("mm", "matmul", "einsum", "linear", "bmm")
# operators of torch.nn that hold linears, where rana_fx.graph.decompose_fused could not take them apart
CLOSED = ("multi_head_attention_forward", "encoder_layer_fwd")
# choose among experts
SELECTIONS = {"topk", "argmax", "multinomial", "sort", "one_hot"}

# of operators whose meaning is known, or that move data between devices
_NAMESPACES = {"aten", "prims", "rana", "inductor", "fsdp", "c10d", "c10d_functional", "_c10d_functional"}

# ---- aten after autograd

_aten = torch.ops.aten
ATEN_CASTS = {torch.ops.prims.convert_element_type.default, _aten._to_copy.default}
ATEN_RESHAPES = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
ATEN_VIEWS = ATEN_RESHAPES | {_aten.expand.default, _aten.clone.default}
ATEN_PERMUTES = {_aten.permute.default, _aten.t.default, _aten.transpose.int}
# each element of the result is an element of the first argument
ATEN_MOVES = ATEN_VIEWS | {
    _aten.alias.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.transpose.int,
    _aten.unbind.int,
    _aten.unsqueeze.default,
    operator.getitem,
}
ATEN_SUMS = {_aten.add.Tensor, _aten.add.Scalar}


def is_call(node: fx.Node) -> bool:
    """Whether a node computes something: neither an input, nor an attribute, nor the output."""
    return node.op in CALLS


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
    return _FUNCTION_OF.get(name, name)


def opaque(node: fx.Node) -> str | None:
    """The name of an operation that is not PyTorch's: a custom operator, a Triton kernel, a function that was not traced into."""
    target = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        return None if name.split("::")[0] in _NAMESPACES else name
    if isinstance(target, types.FunctionType):
        known = (target.__module__ or "").partition(".")[0] in ("torch", "rana_fx")
        return None if known else f"{target.__module__}.{target.__qualname__}"
    return "a Triton kernel" if target is torch.ops.higher_order.triton_kernel_wrapper_mutation else None


def writes_first(node: fx.Node) -> bool:
    """Whether an operation writes into its first argument."""
    if not is_call(node) or not node.args:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.strip("_") if name.startswith("__") else name
    in_place = name.endswith("_") and name != "requires_grad_"
    return name in IN_PLACE_OPERATORS or in_place or node.kwargs.get("inplace") is True


def is_matmul(name: str) -> bool:
    """Whether an operation of this name multiplies by a matrix."""
    return name.endswith(_MATMUL_SUFFIXES)


def contains_matmul(name: str) -> bool:
    """Whether a matmul is part of an operation's name, as in ``_grouped_mm`` or ``einsum_path``."""
    return any(word in name for word in _MATMUL_SUFFIXES)


@functools.cache
def _is_aten_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def is_pointwise(node: fx.Node) -> bool:
    """Each output element depends on the same element of the inputs (up to broadcasting); casts and dropout included."""
    if not is_call(node):
        return False
    name = op_name(node)
    return name in CASTS or name in DROPOUT or name in IDENTITY or _is_aten_pointwise(name)
