"""Put the nodes of a graph that a graph calls in the place of the call.

In: a call of a higher-order operator, the node that names the body, and what the body's inputs are. Out: the body's nodes in
front of the call, and its results; then, for a call of which only items are read, the results in the place of these items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx


def module_at(graph_module: fx.GraphModule, name: str) -> Any:
    """What an attribute of dotted name holds."""
    found: Any = graph_module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def inline_body(
    node: fx.Node, reference: fx.Node, body: fx.GraphModule, operands: Sequence[Any], left_out: Sequence[fx.Node] = ()
) -> tuple[list[fx.Node], Any]:
    """(the nodes made in front of ``node``, what the body returns). Attributes of the body stay in the body.

    Args:
        reference: the node that names the body.
        operands: a node or a constant for each input of the body.
        left_out: nodes of the body that are not wanted; nothing may read them.
    """
    graph, made = node.graph, dict[fx.Node, Any]()
    given, results = iter(operands), None
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                made[inner] = next(given)
            elif inner.op == "output":
                results = fx.map_arg(inner.args[0], made.__getitem__)
            elif inner not in left_out:
                made[inner] = graph.node_copy(inner, made.__getitem__)
                if inner.op == "get_attr":
                    made[inner].target = f"{reference.target}.{inner.target}"
    new = [made[inner] for inner in body.graph.nodes if inner.op not in ("placeholder", "output") and inner in made]
    return new, results


def replace_items(node: fx.Node, results: Sequence[Any]) -> None:
    """Results in the place of the items of ``node`` that are read, which is removed with the node that names its body."""
    for user in list(node.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(results[index])
        node.graph.erase_node(user)
    references = [source for source in node.all_input_nodes if source.op == "get_attr"]
    node.graph.erase_node(node)
    for reference in references:
        if not reference.users:
            reference.graph.erase_node(reference)
