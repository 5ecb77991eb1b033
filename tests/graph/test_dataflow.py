"""Searches over a graph, and names of operations."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from rana_fx.graph import ops
from rana_fx.graph.dataflow import ancestors, descendants, reach, walk
from rana_fx.graph.matmuls import operands_of


@pytest.fixture
def diamond():
    """x -> a -> (b, c) -> d, and a copy of c that reads the size of b."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.relu, (x,))
    b = graph.call_function(torch.neg, (a,))
    c = graph.call_method("new_zeros", (b, 3))
    d = graph.call_function(torch.add, (b, c))
    graph.output(d)
    return dict(zip("xabcd", (x, a, b, c, d), strict=True))


def test_ancestors_and_descendants_include_the_start(diamond):
    x, a, b, c, d = diamond.values()
    assert ancestors([b]) == {x, a, b}
    assert ancestors([d]) == {x, a, b, c, d}
    assert descendants([b]) - {node for node in descendants([b]) if node.op == "output"} == {b, c, d}


def test_walk_yields_every_node_once_and_follows_what_the_loop_decided(diamond):
    x, a, b, _, d = diamond.values()
    order = list(walk([d], lambda node: node.all_input_nodes))
    assert order[0] is d and len(order) == len(set(order)) == 5
    kept = set()
    for node in walk([d], lambda node: node.all_input_nodes if node in kept else ()):
        if node is not a:
            kept.add(node)
    assert x not in kept and b in kept


def test_reach_stops_at_stopping_nodes_and_at_nodes_that_read_only_shapes(diamond):
    x, a, b, c, d = diamond.values()
    inside, met = reach(x, stop=lambda node: node is d)
    assert inside == {a, b} and met == {d}  # c reads the shape of b, not its values
    inside, met = reach(d, stop=lambda node: node is a, forward=False)
    assert inside == {b} and met == {a}
    inside, _ = reach(a, stop=lambda _: False, hidden={b: [x]})
    assert x in inside and c not in inside


@pytest.mark.parametrize(
    ("target", "method", "name", "writes"),
    [
        (torch.add, False, "add", False),
        (torch.ops.aten.add.Tensor, False, "add", False),
        ("add_", True, "add", True),
        ("relu_", True, "relu", True),
        ("requires_grad_", True, "requires_grad", False),
        ("__setitem__", True, "setitem", True),
    ],
)
def test_names_and_writes(target, method, name, writes):
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_method(target, (x, 1)) if method else graph.call_function(target, (x, 1))
    assert ops.op_name(node) == name
    assert ops.writes_first(node) is writes


@pytest.mark.parametrize(
    ("make", "out_first"),
    [
        (lambda g, x, w: g.call_function(torch.nn.functional.linear, (x, w)), True),
        (lambda g, x, w: g.call_function(torch.matmul, (x, w)), False),
        (lambda g, x, w: g.call_function(torch.einsum, ("ti,oi->to", x, w)), True),
        (lambda g, x, w: g.call_function(torch.einsum, ("bti,io->bto", x, w)), False),
        (lambda g, x, w: g.call_function(torch.einsum, ("ti,oi->ot", x, w)), None),  # transposes the result
        (lambda g, x, w: g.call_function(torch.einsum, ("it,io->to", x, w)), None),  # sums over the first dimension
        (lambda g, x, w: g.call_function(torch.einsum, ("ei,ei->e", x, w)), None),  # a dot product of rows
        (lambda g, x, w: g.call_function(torch.einsum, ("...i,oi->...o", x, w)), None),  # an ellipsis
    ],
)
def test_operands_of_a_matmul_by_name(make, out_first):
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    found = operands_of(make(graph, x, w))
    if out_first is None:
        assert found is None
    else:
        assert found is not None and (found.x, found.matrix, found.bias, found.out_first) == (x, w, None, out_first)
