"""Inline regions of gradient checkpointing, so that the linears in them are found.

    y = tag_activation_checkpoint(body, x, w)[0]        becomes        the nodes of body, each tagged to be recomputed

In: a Dynamo graph in which ``torch.utils.checkpoint`` became a call of a graph of its own. Out: one flat graph, whose nodes carry
the tags that PyTorch itself would put on them when AOTAutograd traces the region: the backward pass recomputes them instead of
keeping their results. A region with a policy of its own (``context_fn``) is recomputed as a whole: same values, more work.
"""

from __future__ import annotations

import itertools
import operator

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from rana_fx.graph.inline import inline_body, replace_items
from rana_fx.graph.names import attribute_at

# of regions, in order: what a later one reads of an earlier one is kept. PyTorch counts its own from zero
_regions = itertools.count(1 << 32)


def open_checkpoints(graph_module: fx.GraphModule) -> int:
    """Inline every region, also nested ones; returns how many."""
    from torch._higher_order_ops.wrap import tag_activation_checkpoint

    opened = 0
    for node in list(graph_module.graph.nodes):
        if node.target is tag_activation_checkpoint and _only_indexed(node):
            opened += 1 + _open(graph_module, node)
    if opened:
        graph_module.graph.lint()
        graph_module.recompile()
    return opened


def _only_indexed(node: fx.Node) -> bool:
    return all(user.target is operator.getitem for user in node.users)


def _open(graph_module: fx.GraphModule, node: fx.Node) -> int:
    """Inline one region; returns how many regions lay in it."""
    reference = node.args[0]
    assert isinstance(reference, fx.Node)
    body = attribute_at(graph_module, reference.target)
    region = next(_regions)
    nested = open_checkpoints(body)
    made, results = inline_body(node, reference, body, node.args[1:])
    for inner in made:
        # nodes of a nested region have tags already, which stay
        inner.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        inner.meta.setdefault("ac_graph_id", region)
    replace_items(node, results)
    return nested
