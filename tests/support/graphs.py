"""Aten graphs as Inductor's post-grad passes get them, made of plain PyTorch functions, before and after passes/fuse.py."""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from rana_fx.passes.fuse import fuse

NONE = {"norm": 0, "residual": 0, "gated": 0, "parts": 0}


def fused(function, *inputs) -> tuple[fx.GraphModule, dict[str, int]]:
    """The rewritten graph of ``function`` and how many of each were fused; a second run finds nothing more."""
    module = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*inputs)
    # a decomposition may write in place
    module = make_fx(functionalize(module), tracing_mode="fake")(*inputs)
    counts = fuse(module.graph, devices=("cpu",))
    module.recompile()
    assert fuse(module.graph, devices=("cpu",)) == NONE
    return module, counts


class Fusing(CustomGraphPass):
    """The pass where Inductor runs it; ``counted``: what each graph had."""

    def __init__(self):
        self.counted = []

    def __call__(self, graph):
        self.counted.append(fuse(graph, devices=("cpu",)))

    def uuid(self):
        return None


def ops_of(module: fx.GraphModule) -> list[str]:
    """Names of our operations in a graph, in order."""
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return [str(target).split(".")[1] for target in targets if str(target).startswith("rana.")]


def mask(ranks: int) -> torch.Tensor:
    """Thresholds that keep every other rank, whatever rounding does to its value."""
    return torch.where(torch.arange(ranks) % 2 == 0, 0.0, torch.inf)
