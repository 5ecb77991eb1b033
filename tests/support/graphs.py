"""Aten graphs of PyTorch functions, in the form of Inductor's post-grad passes, before and after ``POST_GRAD``."""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from rana_fx.passes import POST_GRAD
from rana_fx.passes.base import PostGrad
from rana_fx.passes.runner import Runner, run

NONE = {"norm": 0, "residual": 0, "gated": 0, "same_input": 0, "product_norm": 0, "repeated_heads": 0}


def fuse(graph_module: fx.GraphModule, devices: tuple[str, ...] = ("cpu",)) -> dict[str, int]:
    """Run all fusing passes in place and return the number of changes of each."""
    return {name: record.result.count for name, record in records(graph_module, devices).items()}


def reasons(graph_module: fx.GraphModule, devices: tuple[str, ...] = ("cpu",)) -> dict[str, list[str]]:
    """Reasons of each fusing pass for matches that it left unchanged, in the order of nodes."""
    return {
        name: [declined.reason for declined in record.result.declined] for name, record in records(graph_module, devices).items()
    }


def records(graph_module, devices):
    runner = Runner()
    runner.run(POST_GRAD, graph_module, PostGrad(devices), past_autograd=True)
    return {record.name.removeprefix("fuse_"): record for record in runner.records}


def traced(function, *inputs) -> fx.GraphModule:
    """The aten graph of ``function`` with fake values."""
    module = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*inputs)
    # decompositions may contain in-place writes
    return make_fx(functionalize(module), tracing_mode="fake")(*inputs)


def fused(function, *inputs) -> tuple[fx.GraphModule, dict[str, int]]:
    """The rewritten graph of ``function`` and the number of fusions of each pass; a second run must find no more."""
    module = traced(function, *inputs)
    counts = fuse(module)
    assert fuse(module) == NONE
    return module, counts


class Fusing(CustomGraphPass):
    """The fusing passes at their place in Inductor; ``counted``: numbers of fusions of each graph."""

    def __init__(self):
        self.counted = []

    def __call__(self, graph):
        self.counted.append(fuse(graph.owning_module))

    def uuid(self):
        return None


def ops_of(module: fx.GraphModule) -> list[str]:
    """Names of our operations in a graph, in order."""
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return [str(target).split(".")[1] for target in targets if str(target).startswith("rana.")]


def mask(ranks: int) -> torch.Tensor:
    """Thresholds that keep every other rank, independent of rounding."""
    return torch.where(torch.arange(ranks) % 2 == 0, 0.0, torch.inf)


def recording(nodes):
    """A backend that rewrites a graph, adds its nodes to ``nodes``, and runs it eagerly."""

    def rewrite_and_run(gm, example_inputs):
        run(gm, example_inputs)
        nodes.extend(gm.graph.nodes)
        return gm.forward

    return rewrite_and_run
