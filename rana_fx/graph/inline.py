"""Inline the body of a higher-order operator into the calling graph.

In: a call of a higher-order operator, the ``get_attr`` node of its body, and the operands of the body. Out: copies of the body's
nodes in front of the call, and the results; for a call of which only items are read, the results then replace these items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx


def inline_body(
    node: fx.Node, reference: fx.Node, body: fx.GraphModule, operands: Sequence[Any], left_out: Sequence[fx.Node] = ()
) -> tuple[list[fx.Node], Any]:
    """(the new nodes in front of ``node``, the results of the body). Attributes of the body stay in the body's module.

    Args:
        reference: the ``get_attr`` node of the body.
        operands: a node or a constant for each input of the body.
        left_out: nodes of the body that are not copied; no other node may read them.
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
    """Replace the items of ``node`` that are read by ``results``; remove ``node``, and ``get_attr`` nodes that become unused."""
    for user in list(node.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(results[index])
        node.graph.erase_node(user)
    references = [source for source in node.all_input_nodes if source.op == "get_attr"]
    node.graph.erase_node(node)
    for reference in references:
        if not reference.users:
            reference.graph.erase_node(reference)
