"""Add nodes with true metadata to a graph, and the plan's factors as their operands.

In: operations and their inputs, or plain Python to record (``Emitter.record``). Out: nodes whose fake value is computed from
their inputs, with the stack trace of the node they replace. Factors become attributes that AOTAutograd lifts to graph inputs:
values, not constants. The metadata of an operation names its adapter (``Annotation``), for code that counts masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo.source import LocalSource

from rana_fx.adapter import TENSORS
from rana_fx.apply import NONZERO, nonzero_tau
from rana_fx.graph.dataflow import value_of
from rana_fx.graph.fake_values import mode_of
from rana_fx.graph.record import Recorder, dtype_of, inherit
from rana_fx.graph.transforms import plain
from rana_fx.passes.match import Match

__all__ = ["Annotation", "Emitter", "Factors", "annotate", "dtype_of"]

_ATTRIBUTES = {NONZERO: "zeros"}  # attribute names in the graph module that differ from the name of the tensor


@dataclass(frozen=True)
class Annotation:
    """The adapter of a node, and the node's part in it: "router", or the thresholds of its mask (rana_fx/apply.py)."""

    adapter: str
    part: str = "tau"


def annotate(node: fx.Node, annotation: Annotation) -> None:
    node.meta["rana"] = annotation


class Emitter:
    """Creates nodes before ``at``, copying its metadata."""

    def __init__(self, graph_module: fx.GraphModule, at: fx.Node) -> None:
        self._module = graph_module
        self._at = at
        self.record = Recorder(at)  # emit.record(function, *inputs)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """``target(*args, **kwargs)`` as one node, not decomposed."""
        return self.record.create_node("call_function", target, args, kwargs)

    def after(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """``target(*args)`` after ``at``, which is one of its arguments; all other users of ``at`` read the new node instead."""
        with self._at.graph.inserting_after(self._at):
            node = self._at.graph.call_function(target, args)
        self._at.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        inherit(node, self._at)
        return node

    def factor(self, name: str, value: Tensor) -> fx.Node:
        """A get_attr node for a live tensor; one attribute per name and module."""
        if not hasattr(self._module, name):
            if isinstance(value, nn.Parameter):
                self._module.register_parameter(name, value)
            else:
                self._module.register_buffer(name, value)
            sources = getattr(self._module, "_param_name_to_source", None)
            if sources is not None:
                # AOTAutograd rejects attributes that Dynamo did not create, unless they have a source
                sources[name] = LocalSource(f"__rana_fx_{name}")
        node = self.record.create_node("get_attr", name, (), {})
        mode = mode_of([plain(value_of(source)) for source in self._at.all_input_nodes])
        if mode is not None:
            node.meta["example_value"] = mode.from_tensor(value, static_shapes=True)
        return node


class Factors(Mapping[str, Any]):
    """The live tensors of a match's adapter, as proxies inserted before ``emit``'s node, each created on first access."""

    def __init__(self, emit: Emitter, match: Match) -> None:
        self._emit, self._match = emit, match
        self._made: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._made:
            value = self._value(key)
            if value is None:
                raise KeyError(key)
            # two models in one graph may carry one plan, and factors of their own
            owner = f"{self._match.attachment.plan.digest()[:8]}" + (f"n{self._match.number}" if self._match.number else "")
            name = f"rana_{owner}_{self._match.index}_{_ATTRIBUTES.get(key, key)}"
            self._made[key] = self._emit.record.proxy(self._emit.factor(name, value))
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key in (*TENSORS, NONZERO) if self._value(key) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _value(self, key: str) -> Tensor | None:
        if key != NONZERO:
            return self._match.attachment.tensor(self._match.index, key)
        tau = self._match.attachment.tensor(self._match.index, "tau")
        return None if tau is None else nonzero_tau(self._match.adapter, tau.device)
