"""Invariants that every graph keeps after every pass. A violation is a bug of a pass, so it asserts.

Checked: the graph is well formed; every ``rana::`` operation is declared in ``kernels/``, and has a backward pass in a graph
before autograd (attention where gradients flow); every tensor-valued node has a fake value, and it is true: the node, run on
the fake values of its inputs, yields that shape, dtype and device, past autograd also these strides (Inductor lays out memory
by them); no output shares memory with an input or another output that did not before. Only nodes that a pass added or changed
are run, and a graph that came without fake values is not expected to have any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.effects import written
from rana_fx.graph.fake_values import fake_run, mode_of
from rana_fx.graph.names import attribute_at
from rana_fx.graph.ops import DROPOUT, op_name
from rana_fx.graph.transforms import is_plumbing
from rana_fx.kernels import attention, ops
from rana_fx.passes.aliasing import Aliases, storages
from rana_fx.passes.snapshot import Snapshot

_DECLARED = (*vars(ops).values(), *vars(attention).values())
_KNOWN = frozenset(op for op in _DECLARED if isinstance(op, OpOverload) and op.namespace == "rana")
_DIFFERENTIABLE = frozenset({ops.masked_gemv, ops.masked_rows, ops.router})
# their results, or side effects, do not follow from shapes
_NOT_RUN = (_enter_autocast, _exit_autocast, torch._C._set_grad_enabled)
_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


class Verifier:
    """Checks one graph after each pass. ``past_autograd``: whether it is Inductor's graph, and not Dynamo's."""

    def __init__(self, graph_module: fx.GraphModule, *, past_autograd: bool = False) -> None:
        self._module, self._past_autograd = graph_module, past_autograd
        self._mode = mode_of([value_of(node) for node in graph_module.graph.nodes])
        self._aliases = Aliases()
        self._seen = Snapshot.of(graph_module.graph)
        self._shared = self._aliases.pairs(graph_module.graph)

    def changed(self) -> bool:
        """Whether the graph changed since the last call of ``verify``, or since construction."""
        return not Snapshot.of(self._module.graph).equals(self._seen)

    def verify(self) -> None:
        """Check the graph and what changed in it. Raises AssertionError with the offending node."""
        graph = self._module.graph
        graph.lint()
        before, self._seen = self._seen, Snapshot.of(graph)
        added, changed = set(self._seen.added(before)), set(self._seen.changed(before))
        for node in self._seen.nodes:
            if node in added:
                self._check_operation(node)
            if self._mode is not None and (node in added or node in changed):
                self._check_value(node, self._mode, fresh=node in added)
        shared, self._shared = self._shared, self._aliases.pairs(graph)
        for output, other in sorted(self._shared - shared):
            raise AssertionError(f"{output} shares memory with {other}, and did not before")

    def _check_operation(self, node: fx.Node) -> None:
        target = node.target
        if isinstance(target, OpOverload) and target.namespace == "rana":
            assert target in _KNOWN, f"{node}: unknown operation {target}"
            trained = torch.is_grad_enabled() and any(map(_requires_grad, node.all_input_nodes))
            differentiable = target in _DIFFERENTIABLE or (target is attention.decode_attention and not trained)
            assert self._past_autograd or differentiable, f"{node}: {target} has no backward pass"

    def _check_value(self, node: fx.Node, mode: FakeTensorMode, *, fresh: bool) -> None:
        if not _is_run(node):
            return
        try:
            found = attribute_at(self._module, node.target) if node.op == "get_attr" else _run(node, mode)
        except _NEEDS_DATA:
            return
        except Exception as error:
            raise AssertionError(f"{node}: does not run on the fake values of its inputs: {error}") from error
        value = node.meta.get("val") if self._past_autograd else value_of(node)
        wrong = _difference(value, found, strides=self._past_autograd and node.op != "get_attr")
        assert wrong is None, f"{node}: {wrong}"
        if node.op != "get_attr" and not _mutates(node):
            self._check_memory(node, value, found, fresh=fresh)

    def _check_memory(self, node: fx.Node, value: object, found: object, *, fresh: bool) -> None:
        """A new node that is a view must share the storage of its input; for an older node this is recorded as true."""
        for source in node.all_input_nodes:
            views = bool(storages(found) & storages(value_of(source)))
            # dropout of nothing is its input or a copy, by where it was traced (inside a region of checkpointing or not)
            if fresh and op_name(node) not in DROPOUT:
                lies = bool(storages(value) & storages(value_of(source)))
                assert lies == views, f"{node}: its fake value {'lies' if lies else 'does not lie'} in the memory of {source}"
            elif views:
                self._aliases.join(value, found)


def _requires_grad(node: fx.Node) -> bool:
    return bool(getattr(value_of(node), "requires_grad", False))


def _is_run(node: fx.Node) -> bool:
    """Whether the value of a node follows from those of its inputs, and all of these have one."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or isinstance(node.target, HigherOrderOperator) or is_plumbing(node):
        return False
    # modules, constants and nodes that were not traced have no fake value
    return node.target not in _NOT_RUN and all(value_of(source) is not None for source in node.all_input_nodes)


def _run(node: fx.Node, mode: FakeTensorMode) -> Any:
    """Run a node on fake values, without gradients; on copies where the node writes to its inputs."""
    ignored = contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.ignore_fresh_unbacked_symbols()
    with torch.no_grad(), ignored:
        return fake_run(node, _copied(mode) if _mutates(node) else value_of, mode)


def _copied(mode: FakeTensorMode) -> Any:
    def copy(node: fx.Node) -> object:
        value = value_of(node)
        with mode:
            return value.clone() if isinstance(value, Tensor) else value

    return copy


def _mutates(node: fx.Node) -> bool:
    return bool(written(node))


def _difference(value: object, found: object, *, strides: bool) -> str | None:
    """How a recorded value differs from the one that was found, or None."""
    if isinstance(found, (tuple, list)) and any(isinstance(item, (Tensor, tuple, list)) for item in found):
        if not isinstance(value, (tuple, list)) or len(value) != len(found):
            return f"has the fake value {value!r}, and yields {len(found)} values"
        parts = (_difference(one, other, strides=strides) for one, other in zip(value, found, strict=True))
        return next((part for part in parts if part is not None), None)
    if not isinstance(found, Tensor):
        return None
    if not isinstance(value, Tensor):
        return f"has no fake value, and yields {tuple(found.shape)} of {found.dtype}"
    if value.dtype != found.dtype or value.device != found.device:
        return f"has a fake value of {value.dtype} on {value.device}, and yields {found.dtype} on {found.device}"
    if not _same(value.shape, found.shape):
        return f"has a fake value of shape {tuple(value.shape)}, and yields {tuple(found.shape)}"
    if strides and value.layout is torch.strided and 0 not in value.shape:
        wide = [dim for dim, size in enumerate(value.shape) if size != 1]
        one, other = ([tensor.stride(dim) for dim in wide] for tensor in (value, found))
        if not _same(one, other):
            return f"has a fake value of strides {tuple(value.stride())}, and yields {tuple(found.stride())}"
    return None


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether sizes are equal, as far as this can be decided without a guard."""
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    if free_unbacked_symbols(one) or free_unbacked_symbols(other):
        return True
    first, second = (size if isinstance(size, int) else size.node.hint for size in (one, other))
    return first is None or second is None or bool(first == second)
