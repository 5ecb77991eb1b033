"""Record plain Python as nodes of a graph, with true metadata.

In: a node of a graph, a function of tensors and the nodes it is called with. Out: the nodes it returns, before that node.
The function runs on proxies with the dtype, shape and ``requires_grad`` of their fake values, so it may branch on these; every
node gets its fake value when it is created, and the stack trace of the node it is inserted before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.fake_values import fake_run

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
        self.made.append(node)  # also where it cannot be run
        inherit(node, self.at)
        return node

    def proxy(self, node: fx.Node) -> Recorded:
        return Recorded(node, self)

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(*inputs)``, nodes being given and returned as nodes wherever they stand in a list, tuple or mapping."""
        over: Any = fx.node.map_aggregate  # its type stub does not allow proxies
        given = over(inputs, lambda leaf: self.proxy(leaf) if isinstance(leaf, fx.Node) else leaf)
        return over(function(*given), lambda leaf: leaf.node if isinstance(leaf, fx.Proxy) else leaf)


def inherit(node: fx.Node, at: fx.Node) -> None:
    """Metadata for a new node made for ``at``: its own value and what else ``at`` has."""
    node.meta = {key: value for key, value in at.meta.items() if key not in VALUES}
    value = fake_run(node) if node.op in ("call_function", "call_method") else None
    if value is not None:
        node.meta["example_value"] = value


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype a node yields, where tracing recorded it."""
    value = value_of(node)
    return value.dtype if isinstance(value, Tensor) else None
