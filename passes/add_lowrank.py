"""Add what LoRA trains to the matrices that a graph reads.

    y = rana.masked_gemv(v, tau, weight, ...)
  becomes
    w = weight + (up @ down) * scale; y = rana.masked_gemv(v, tau, w, ...)

After the rewrites, so that linears are still found by their weight. The sums are tagged to be recomputed in the backward pass:
kept, they would take as much memory as the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from rana_fx.attachment import Attachment
from rana_fx.passes.emit import Emitter
from rana_fx.sites import parameters_of


def add_lowrank(graph_module: fx.GraphModule, example_inputs: Sequence[object], attachments: Sequence[Attachment]) -> int:
    """Rewrite in place; returns how many reads of a matrix were changed."""
    tables = [attachment.factors.lowrank for attachment in attachments if attachment.factors.lowrank is not None]
    if not tables:
        return 0
    changed = 0
    position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    for node, parameter in parameters_of(graph_module, example_inputs).items():
        found = next((entry for entry in (table.of(parameter) for table in tables) if entry is not None), None)
        users = sorted(node.users, key=position.__getitem__)
        if found is None or not users:
            continue
        key, up, down, scale = found
        emit = Emitter(graph_module, users[0])
        name = "rana_lowrank_" + "".join(letter if letter.isalnum() else "_" for letter in key)
        product = emit.call(torch.matmul, emit.factor(f"{name}_up", up), emit.factor(f"{name}_down", down))
        made: list[Any] = [product, emit.call(torch.mul, product, scale)]
        made.append(emit.method("to", made[-1], parameter.dtype))
        made.append(emit.call(torch.add, node, made[-1]))
        for step in made:
            step.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            step.meta.setdefault("ac_graph_id", 0)
        for user in users:
            user.replace_input_with(node, made[-1])
        changed += 1
    return changed
