"""Record plain Python as nodes of a graph, with true metadata.

In: a place in a graph, a function of tensors and the nodes it is called with. Out: the nodes it returns, in front of that place.
The function runs on proxies that know the dtype, shape and ``requires_grad`` of the fake value behind them, so it may decide by
these; every node has its fake value from the moment it is made, and the stack trace of what it is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor, fx

from rana_fx.graph.dataflow import value_of

VALUES = ("example_value", "val", "grapharg")  # of a node's metadata, what belongs to its value


class Recorded(fx.Proxy):
    """A node that is being computed with. What is not known of its value is None."""

    @property
    def dtype(self) -> torch.dtype | None:
        return getattr(value_of(self.node), "dtype", None)

    @property
    def shape(self) -> torch.Size | None:
        return getattr(value_of(self.node), "shape", None)

    @property
    def requires_grad(self) -> bool | None:
        return getattr(value_of(self.node), "requires_grad", None)


class Recorder(fx.proxy.GraphAppendingTracer):
    """Makes nodes in front of ``at``, which they inherit everything but their value from."""

    def __init__(self, at: fx.Node) -> None:
        super().__init__(at.graph)
        self.at = at
        self.made: list[fx.Node] = []  # so far

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.at):
            node = super().create_node(*args, **kwargs)
        inherit(node, self.at)
        self.made.append(node)
        return node

    def proxy(self, node: fx.Node) -> Recorded:
        return Recorded(node, self)

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(*inputs)``, nodes being given and returned as nodes wherever they stand in a list, tuple or mapping."""
        over: Any = fx.node.map_aggregate  # its type knows no proxies
        given = over(inputs, lambda leaf: self.proxy(leaf) if isinstance(leaf, fx.Node) else leaf)
        return over(function(*given), lambda leaf: leaf.node if isinstance(leaf, fx.Proxy) else leaf)


def inherit(node: fx.Node, at: fx.Node) -> None:
    """Metadata for a new node made for ``at``: its own value and what else ``at`` has."""
    node.meta = {key: value for key, value in at.meta.items() if key not in VALUES}
    value = fake_run(node)
    if value is not None:
        node.meta["example_value"] = value


def fake_run(node: fx.Node) -> Any:
    """The fake value of a call, by running it on the fake values of its inputs; None where there are none."""
    if node.op not in ("call_function", "call_method"):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _fake)
    values: Any = [value_of(source) for source in node.all_input_nodes]
    leaves: list[Any] = optree.tree_leaves(values)
    mode = next((leaf.fake_mode for leaf in leaves if isinstance(leaf, torch._subclasses.FakeTensor)), None)
    if mode is None:
        return None
    run: Callable[..., Any] = node.target if node.op == "call_function" else _method(str(node.target))  # type: ignore[assignment]
    with mode:
        return run(*args, **kwargs)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype a node yields, where tracing recorded it."""
    value = value_of(node)
    return value.dtype if isinstance(value, Tensor) else None


def _fake(node: fx.Node) -> Any:
    return value_of(node)


def _method(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Mapping[str, Any]) -> Any:
        return getattr(self, name)(*args, **kwargs)

    return call
