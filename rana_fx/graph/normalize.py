"""``NORMALIZE``: passes over every Dynamo graph before the search for linears, so that all stages find the same ones.

In: a graph and its inputs. Out: the same graph, in which operands given by name are positional, regions that hold linears are
inlined, calls with ``out=`` are split into the computation and a copy, uses of a tensor written in place read its last write, and
fused operations are decomposed into linears and the operations between them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rana_fx.graph.checkpoint_regions import open_checkpoints
from rana_fx.graph.decompose_fused import unfuse
from rana_fx.graph.functionalize import redirect, separate_outputs
from rana_fx.graph.graph_pass import Declined, Pass, PassResult
from rana_fx.graph.linears import parameters_of
from rana_fx.graph.positional import by_position
from rana_fx.graph.regions import open_regions


def order_arguments(graph_module: fx.GraphModule, _: Sequence[object]) -> PassResult:
    """Tensors given by name, and dimensions of data movement, become positional."""
    return PassResult(by_position(graph_module))


def inline_checkpoint_regions(graph_module: fx.GraphModule, _: Sequence[object]) -> PassResult:
    """Regions of ``torch.utils.checkpoint`` become part of the graph around them."""
    from torch._higher_order_ops.wrap import tag_activation_checkpoint

    count = open_checkpoints(graph_module)
    left = graph_module.graph.find_nodes(op="call_function", target=tag_activation_checkpoint)
    return PassResult(count, tuple(Declined(node.name, "its results are read as a whole") for node in left))


def inline_regions(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> PassResult:
    """Inline other regions that hold linears, including the forward pass of an autograd.Function."""
    return open_regions(graph_module, parameters_of(graph_module, example_inputs))


def separate_results(graph_module: fx.GraphModule, _: Sequence[object]) -> PassResult:
    """Split calls with ``out=`` into the computation and a copy."""
    return PassResult(separate_outputs(graph_module))


def redirect_reads(graph_module: fx.GraphModule, _: Sequence[object]) -> PassResult:
    """What reads a tensor after a write into it reads the result of the write."""
    return PassResult(redirect(graph_module))


def decompose_fused(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> PassResult:
    """Fused attention, encoder layers and einsums become linears and what lies between them."""
    return unfuse(graph_module, parameters_of(graph_module, example_inputs))


# context: the graph's inputs
NORMALIZE: tuple[Pass[Sequence[object]], ...] = (
    # first: all others read operands by position, also those of regions
    order_arguments,
    # the others look at one flat graph
    inline_checkpoint_regions,
    inline_regions,
    # before uses are redirected: the result of a call with ``out=`` is then a node of its own, which they may read
    separate_results,
    # before operations are taken apart: their parts then read what the whole would have read
    redirect_reads,
    decompose_fused,
)


def prepare(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> None:
    """All of ``NORMALIZE``, in place, for stages that observe a graph. The compiler runs it by passes/runner.py."""
    for step in NORMALIZE:
        step(graph_module, example_inputs)
