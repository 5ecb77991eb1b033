"""What a call writes, views and multiplies, learned by running it on values without data; names decide where it does not run."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from rana_fx.graph import effects
from rana_fx.graph.effects import effect_of, multiplies, written


@pytest.fixture
def graph():
    """(a graph, its inputs x and y of shape (4, 8) and w of (8, 8)) with fake values."""
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes = {}
    for name, shape in (("x", (4, 8)), ("y", (4, 8)), ("w", (8, 8))):
        nodes[name] = graph.placeholder(name)
        with mode:
            nodes[name].meta["example_value"] = torch.empty(shape)
    return graph, nodes["x"], nodes["y"], nodes["w"]


def function(target, *args, **kwargs):
    return lambda g, x, y, w: g.call_function(
        target, tuple(_at(a, x, y, w) for a in args), {k: _at(a, x, y, w) for k, a in kwargs.items()}
    )


def method(name, *args):
    return lambda g, x, y, w: g.call_method(name, tuple(_at(a, x, y, w) for a in args))


def _at(item, x, y, w):
    if isinstance(item, (list, tuple)):
        return type(item)(_at(part, x, y, w) for part in item)
    return {"x": x, "y": y, "w": w}.get(item, item) if isinstance(item, str) else item


CALLS = {
    "pure": (function(torch.add, "x", "y"), "", "", False),
    "method in place": (method("mul_", "x", 2), "x", "x", False),
    "out": (function(torch.mul, "x", 2, out="y"), "y", "y", False),
    "operator": (function(operator.iadd, "x", "y"), "x", "x", False),
    "operator that writes nothing": (function(operator.imatmul, "x", "w"), "", "", True),
    "index": (function(operator.setitem, "x", (slice(None), 0), 1.0), "x", "", False),
    "flag": (function(F.relu, "x", inplace=True), "x", "x", False),
    "several": (function(torch._foreach_mul_, ["x", "y"], 2.0), "xy", "", False),
    "overload": (function(torch.ops.aten.mul_.Tensor, "x", "y"), "x", "x", False),
    "packet": (function(torch.ops.aten.mul_, "x", "y"), "x", "x", False),
    "view": (method("view", "x", -1), "", "x", False),
    "reshape that views": (method("reshape", "x", 32), "", "x", False),
    "parts": (function(torch.chunk, "x", 2, -1), "", "x", False),
    "item by a tensor": (function(operator.getitem, "x", "y"), "", "", False),
    "contiguous": (method("contiguous", "x"), "", "x", False),
    "clone": (method("clone", "x"), "", "", False),
    "moved": (method("set_", "x", "y"), "x", "xy", False),
    "linear": (function(F.linear, "x", "w"), "", "", True),
    "hidden product": (function(torch.cdist, "x", "y"), "", "", False),
    "tensordot": (function(torch.tensordot, "x", "w", 1), "", "", True),
    "convolution": (function(F.conv1d, "x", "w"), None, None, True),
}


@pytest.mark.parametrize("name", CALLS)
def test_effects(name, graph):
    graph, x, y, w = graph
    make, writes, aliases, product = CALLS[name]
    node = make(graph, x, y, w)
    if writes is not None:
        assert "".join(sorted(source.name for source in written(node))) == writes
        assert "".join(sorted(node.all_input_nodes[place].name for place in effect_of(node).aliases)) == aliases
    assert multiplies(node) is product
    for source in (x, y, w):
        assert source.meta["example_value"].shape in ((4, 8), (8, 8)) and source.meta["example_value"]._version == 0


def test_a_transposed_reshape_copies(graph):
    graph, x, *_ = graph
    turned = graph.call_method("t", (x,))
    turned.meta["example_value"] = x.meta["example_value"].t()
    assert effect_of(turned).aliases == {0}
    assert effect_of(graph.call_method("reshape", (turned, 32))).aliases == frozenset()
    assert effect_of(graph.call_method("contiguous", (turned,))).aliases == frozenset()


def test_what_was_learned_is_not_learned_again(graph, monkeypatch):
    graph, x, y, w = graph
    monkeypatch.setattr(effects, "_learned", {})
    first = effect_of(graph.call_function(F.linear, (x, w)))
    monkeypatch.setattr(effects, "_by_running", None)
    assert effect_of(graph.call_function(F.linear, (y, w))) == first
    with pytest.raises(TypeError):
        effect_of(graph.call_function(F.linear, (x, w), {"bias": None}))


def test_names_decide_without_values():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert written(graph.call_method("add_", (x, y))) == (x,)
    assert written(graph.call_function(torch.add, (x, 1), {"out": y})) == (y,)
    assert written(graph.call_function(torch.ops.aten.mul_, (x, y))) == (x,)
    assert effect_of(graph.call_method("view", (x, -1))).aliases == {0}
    assert effect_of(graph.call_method("clone", (x,))).aliases == frozenset()


def test_a_kernel_whose_source_is_not_known_writes_all_tensors(graph):
    graph, x, y, _ = graph
    given = {"kernel_idx": -1, "constant_args_idx": -1, "grid": [(1,)], "tma_descriptor_metadata": {}}
    given["kwargs"] = {"a": x, "b": y, "n": 4}
    node = graph.call_function(torch.ops.higher_order.triton_kernel_wrapper_mutation, (), given)
    assert written(node) == (x, y)


def test_what_a_body_writes_is_written(graph):
    outer, x, y, _ = graph
    inner = fx.Graph()
    a, b = inner.placeholder("a"), inner.placeholder("b")
    a.meta["example_value"], b.meta["example_value"] = x.meta["example_value"], y.meta["example_value"]
    view = inner.call_method("view", (b, -1))
    view.meta["example_value"] = b.meta["example_value"].view(-1)
    inner.call_method("mul_", (view, 2))
    inner.output((inner.call_function(torch.add, (a, b)),))
    body = outer.get_attr("body")
    outer.call_function(torch.ops.higher_order.wrap, (body, x, y))
    outer.output(())
    module = fx.GraphModule({"body": fx.GraphModule({}, inner)}, outer)
    (node,) = module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap)
    assert [source.name for source in written(node)] == ["y"] and not multiplies(node)
