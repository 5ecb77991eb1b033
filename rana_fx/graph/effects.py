"""The effect of a call on memory: which of its inputs it mutates, and which of its inputs its results alias.

    torch.mul(a, b, out=c)    writes c, and its result is c
    x.narrow(0, 0, 2)         its result is a view of x
    x @ w                     neither; it contains a matrix product

In: a node of a Dynamo graph (torch function, method, Python operator, higher-order operator) or of an exported graph (overload).
Out: an ``Effect``. The call is run once on fake tensors with the metadata of its inputs, and the aten overloads that it
dispatches are observed: their schemas declare which arguments are written, and shared storages identify views. Effects are cached
by the target of the call and by shapes, strides, dtypes, devices and constants of its arguments. Calls that cannot run on fake
tensors (a mask that selects rows) are classified by name (``rana_fx.graph.ops``).
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.names import attribute_at
from rana_fx.graph.ops import VIEWS, contains_matmul, is_call, op_name, writes_first
from rana_fx.graph.transforms import unwrapped

# products that the FLOP counter counts, and those that it counts only after decomposition
_FURTHER = (
    "mv", "addmv", "addmv_", "dot", "vdot", "addbmm", "addbmm_", "addmm_", "baddbmm_", "_int_mm", "_weight_int8pack_mm",
    "_weight_int4pack_mm", "_grouped_mm", "_trilinear", "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
_PRODUCTS = {*flop_registry} | {getattr(torch.ops.aten, name) for name in _FURTHER if hasattr(torch.ops.aten, name)}
_UNKNOWN_SIZE = 2  # replaces a size that depends on data
_MOST_KEPT = 8192


@dataclass(frozen=True)
class Effect:
    """Positions among ``node.all_input_nodes``. ``multiplies``: whether the call contains a matrix product or a convolution."""

    writes: frozenset[int] = frozenset()
    aliases: frozenset[int] = frozenset()
    multiplies: bool = False


_NONE = Effect()
_learned: dict[object, Effect] = {}


def effect_of(node: fx.Node) -> Effect:
    """The effect of a node on its inputs, from the cache where it holds one."""
    if not is_call(node) or not node.all_input_nodes:
        return _NONE
    if isinstance(node.target, HigherOrderOperator):
        return _of_operator(node)
    values = [value_of(source) for source in node.all_input_nodes]
    if any(value is None for value in values):
        return _by_name(node)
    key = None if isinstance(node.target, types.MethodType) else _signature(node, values)
    found = None if key is None else _learned.get(key)
    if found is None:
        found = _by_running(node, values)
        if key is not None:
            if len(_learned) >= _MOST_KEPT:
                _learned.clear()
            _learned[key] = found
    return found


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs of a node that the node writes into."""
    sources = node.all_input_nodes
    return tuple(sources[position] for position in sorted(effect_of(node).writes))


def multiplies(node: fx.Node) -> bool:
    """Whether a node contains a matrix product or a convolution."""
    return is_call(node) and (contains_matmul(op_name(node)) or effect_of(node).multiplies)


# ---- cache keys


def _signature(node: fx.Node, values: list[object]) -> object:
    place = {source: position for position, source in enumerate(node.all_input_nodes)}
    return hashable((node.op, node.target, frozen((node.args, node.kwargs), place), tuple(map(described, values))))


def hashable(key: object) -> object:
    """The key, or None where a part of it cannot be hashed, such as a symbolic size."""
    try:
        hash(key)
    except TypeError:
        return None
    return key


def frozen(item: object, place: dict[fx.Node, int]) -> object:
    """Arguments of a node as a key: other nodes by their positions, constants with their types."""
    if isinstance(item, fx.Node):
        return fx.Node, place[item]
    if isinstance(item, (tuple, list)):
        return type(item), tuple(frozen(part, place) for part in item)
    if isinstance(item, dict):
        return dict, tuple((key, frozen(part, place)) for key, part in item.items())
    if isinstance(item, slice):
        return slice, tuple(frozen(part, place) for part in (item.start, item.stop, item.step))
    return type(item), item if type(item).__hash__ is not None else repr(item)


def described(value: object) -> object:
    """A value as a key. Tensors are described by their metadata: dtype, device, layout, sizes and strides."""
    if isinstance(value, Tensor):
        sizes, strides = tuple(map(_known, value.shape)), tuple(map(_known, value.stride()))
        return value.dtype, value.device, value.layout, sizes, strides
    if isinstance(value, (tuple, list)):
        return type(value), tuple(described(part) for part in value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _known(value)
    return type(value), value if type(value).__hash__ is not None else repr(value)


def _known(size: Any) -> Any:
    """A size as a number; a symbolic size by its hint, the size it was traced with."""
    if isinstance(size, (int, float, bool)):
        return size
    return _UNKNOWN_SIZE if size.node.hint is None else size.node.hint


# ---- observing a run


class _Watcher(TorchDispatchMode):
    """Records which tensors the dispatched overloads write into, identified by storage, and whether one is a product."""

    def __init__(self, owners: dict[int, set[int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = owners
        self.written: set[int] = set()
        self.multiplies = False

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.multiplies |= func.overloadpacket in _PRODUCTS
        for value in _written_arguments(func, args, kwargs):
            self.written |= owners_of(value, self._owners)
        return func(*args, **kwargs)


def _written_arguments(overload: OpOverload, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments that an overload writes according to its schema."""
    if not overload._schema.is_mutable:
        return
    for position, argument in enumerate(overload._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[position] if position < len(args) else kwargs.get(argument.name)


def owners_of(value: object, owners: dict[int, set[int]]) -> set[int]:
    """The owners of the storages of the tensors of a value."""
    return set().union(*(owners.get(_memory(leaf), ()) for leaf in tensors_of(value)))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a value, which may be nested."""
    leaves: list[Any] = optree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return int(unwrapped(tensor).untyped_storage()._cdata)


def _owners(values: list[object]) -> dict[int, set[int]]:
    """Storage -> the positions of the values that use it."""
    found: dict[int, set[int]] = {}
    for position, value in enumerate(values):
        for tensor in tensors_of(value):
            found.setdefault(_memory(tensor), set()).add(position)
    return found


def _by_running(node: fx.Node, values: list[object]) -> Effect:
    named = _by_name(node)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad():
            given = [_alike(value) for value in values]
    except Exception:  # a layout without strides, a subclass
        return named
    owners = _owners(given)
    place = dict(zip(node.all_input_nodes, given, strict=True))
    watcher = _Watcher(owners)
    try:
        with mode, torch.no_grad(), watcher, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run of the model emits them
            result = _call(node, place.__getitem__)
    except Exception:  # the call needs data, or the autocast state of its place in the graph
        writes = watcher.written | set(named.writes) | _by_schema(node)
        return Effect(frozenset(writes), named.aliases, watcher.multiplies or named.multiplies)
    same = {position for position, value in enumerate(given) if any(leaf is value for leaf in tensors_of(result))}
    shared = owners_of(result, owners) | same
    # ``x.set_(y)``: from then on x uses the storage of y
    moved = {position for position, value in enumerate(given) if tensors_of(value) and position not in owners_of(value, owners)}
    shared |= moved | owners_of([given[position] for position in moved], owners)
    return Effect(frozenset(watcher.written | _by_schema(node)), frozenset(shared), watcher.multiplies)


def _call(node: fx.Node, values: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    run: Any = node.target
    return run(*args, **kwargs)


def _alike(value: object) -> object:
    """A new tensor with the metadata of the given one, in the active mode; symbolic numbers are replaced by their hints."""
    if isinstance(value, Tensor):
        sizes, strides = [_known(size) for size in value.shape], [_known(stride) for stride in value.stride()]
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    if isinstance(value, (tuple, list)):
        parts: list[Any] = [_alike(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return _known(value) if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def _by_schema(node: fx.Node) -> set[int]:
    """Positions that an overload of torch.ops writes according to its schema; for a packet, those that any overload writes."""
    target = node.target
    overloads = [target] if isinstance(target, OpOverload) else []
    if isinstance(target, OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
    found: list[fx.Node] = []
    for overload in overloads:
        for value in _written_arguments(overload, node.args, node.kwargs):
            fx.node.map_arg(value, found.append)
    return {position for position, source in enumerate(node.all_input_nodes) if source in found}


def _by_name(node: fx.Node) -> Effect:
    """The effect inferred from the name of an operation and from its argument ``out``."""
    sources = node.all_input_nodes
    found: list[fx.Node] = []
    if writes_first(node):
        fx.node.map_arg(node.args[0], found.append)
    fx.node.map_arg(node.kwargs.get("out"), found.append)
    writes = {position for position, source in enumerate(sources) if source in found} | _by_schema(node)
    first = node.args[0] if node.args else None
    view = op_name(node) in VIEWS and isinstance(first, fx.Node) and not _indexed_by_tensor(node)
    aliases = writes | ({sources.index(first)} if view and isinstance(first, fx.Node) else set())
    return Effect(frozenset(writes), frozenset(aliases), contains_matmul(op_name(node)))


def _indexed_by_tensor(node: fx.Node) -> bool:
    """Whether a node indexes by a tensor, which copies."""
    others = (value_of(source) for source in node.all_input_nodes if source is not node.args[0])
    return op_name(node) == "getitem" and any(isinstance(value, Tensor) for value in others)


# ---- higher-order operators


def bodies_of(node: fx.Node) -> list[tuple[fx.Node, fx.GraphModule]]:
    """The graphs that a higher-order operator calls: (``get_attr`` node of the graph, its module)."""
    if not isinstance(node.target, HigherOrderOperator) or node.graph.owning_module is None:
        return []
    found = []
    for source in node.all_input_nodes:
        held = attribute_at(node.graph.owning_module, source.target) if source.op == "get_attr" else None
        if isinstance(held, fx.GraphModule):
            found.append((source, held))
    return found


def _of_operator(node: fx.Node) -> Effect:
    """The effect of a Triton kernel, or of the graphs that a higher-order operator calls."""
    sources = node.all_input_nodes
    found: list[fx.Node] = []
    if node.target is torch.ops.higher_order.triton_kernel_wrapper_mutation:
        arguments: Any = node.kwargs["kwargs"]
        for name in _written_by_triton(node):
            fx.node.map_arg(arguments.get(name), found.append)
    bodies = bodies_of(node)
    if node.target is torch.ops.higher_order.autograd_function_apply:
        bodies = bodies[:1]  # the second one runs in the backward pass
    product = False
    for _, body in bodies:
        product |= any(multiplies(inner) for inner in body.graph.nodes)
        found += _written_in(node, body)
    writes = {position for position, source in enumerate(sources) if source in found}
    return Effect(frozenset(writes), frozenset(), product)


def _written_by_triton(node: fx.Node) -> list[str]:
    """Names of the arguments that a Triton kernel stores to; of all tensors, where its source cannot be analysed."""
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors

    given: Any = dict(node.kwargs)
    over: Any = fx.node.map_arg  # typed for arguments of nodes, used for values
    arguments = over(given["kwargs"], value_of)
    try:
        return list(
            get_mutated_tensors(given["kernel_idx"], given["constant_args_idx"], arguments, given["tma_descriptor_metadata"])
        )
    except Exception:  # the analysis of a kernel's source may fail in any way
        return [name for name, value in arguments.items() if isinstance(value, Tensor)]


def _written_in(node: fx.Node, body: fx.GraphModule) -> list[fx.Node]:
    """The inputs of an operator that alias a tensor that the body writes."""
    targets = [target for inner in body.graph.nodes for target in written(inner)]
    if not targets:
        return []
    sources = node.all_input_nodes
    owners = _owners([value_of(source) for source in sources])
    return [sources[position] for target in targets for position in owners_of(value_of(target), owners)]
