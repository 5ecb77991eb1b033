"""Put new nodes into a graph with true metadata, and the plan's factors beside them.

In: operations and their inputs. Out: nodes whose fake value is computed, not guessed, and which carry the stack trace
of what they replace. Factors become attributes that AOTAutograd lifts to graph inputs: values, not constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import LocalSource

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.fake_values import fake_run


class Emitter:
    """Creates nodes before ``at``, copying its metadata."""

    def __init__(self, graph_module: fx.GraphModule, at: fx.Node) -> None:
        self._module = graph_module
        self._at = at

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """``target(*args, **kwargs)``."""
        with self._at.graph.inserting_before(self._at):
            node = self._at.graph.call_function(target, args, kwargs)
        return self._fill(node)

    def method(self, name: str, *args: Any) -> fx.Node:
        """``args[0].name(*args[1:])``."""
        with self._at.graph.inserting_before(self._at):
            node = self._at.graph.call_method(name, args)
        return self._fill(node)

    def after(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """``target(*args)`` behind ``at``, which is one of its arguments, and instead of it for all who read that."""
        with self._at.graph.inserting_after(self._at):
            node = self._at.graph.call_function(target, args)
        self._at.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        return self._fill(node)

    def factor(self, name: str, value: Tensor) -> fx.Node:
        """A get_attr node for a live tensor; one attribute per name and module."""
        if not hasattr(self._module, name):
            if isinstance(value, nn.Parameter):
                self._module.register_parameter(name, value)
            else:
                self._module.register_buffer(name, value)
            sources = getattr(self._module, "_param_name_to_source", None)
            if sources is not None:
                # without a source of its own, AOTAutograd refuses attributes that Dynamo did not create
                sources[name] = LocalSource(f"__rana_fx_{name}")
        with self._at.graph.inserting_before(self._at):
            node = self._at.graph.get_attr(name)
        self._copy_meta(node)
        like = next((v for v in map(value_of, self._at.all_input_nodes) if isinstance(v, torch._subclasses.FakeTensor)), None)
        if like is not None:
            node.meta["example_value"] = like.fake_mode.from_tensor(value, static_shapes=True)
        return node

    def _copy_meta(self, node: fx.Node) -> None:
        node.meta = {key: value for key, value in self._at.meta.items() if key not in ("example_value", "val", "grapharg")}

    def _fill(self, node: fx.Node) -> fx.Node:
        self._copy_meta(node)
        value = fake_run(node)
        if value is not None:
            node.meta["example_value"] = value
        return node


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype a node yields, where tracing recorded it."""
    value = value_of(node)
    return value.dtype if isinstance(value, Tensor) else None
