"""The fake values of nodes: computed by running a node on those of its inputs, under the autocast of its place in the graph.

In: a node of a Dynamo or aten graph. Out: a value without data, of the shape, dtype, device and strides that the node yields.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.transforms import plain


def fake_run(node: fx.Node, values: Callable[[fx.Node], Any] = value_of, mode: FakeTensorMode | None = None) -> Any:
    """The value of a call, by running it on ``values`` of its inputs in their mode, or in ``mode``. None without either."""
    known = {source: plain(values(source)) for source in node.all_input_nodes}
    mode = mode_of(list(known.values())) or mode
    if mode is None:
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    run: Any = node.target if node.op == "call_function" else getattr(args[0], str(node.target))
    with mode, autocast_at(node):
        return run(*(args if node.op == "call_function" else args[1:]), **kwargs)


def mode_of(values: Any) -> FakeTensorMode | None:
    """The mode of the first fake tensor among values, which may be nested."""
    leaves: list[Any] = optree.tree_leaves(values)
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


@contextlib.contextmanager
def autocast_at(node: fx.Node) -> Iterator[None]:
    """Inside the autocast regions that the graph opens before a node and closes behind it."""
    with contextlib.ExitStack() as stack:
        for opened in node.graph.find_nodes(op="call_function", target=_enter_autocast):
            closed = any(user.target is _exit_autocast and user < node for user in opened.users)
            if opened < node and not closed:
                device, dtype, enabled, cache = opened.args
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield
