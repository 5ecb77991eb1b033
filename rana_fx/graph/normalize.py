"""What is done to every Dynamo graph before anything is looked for in it.

In: a graph and its inputs. Out: the same graph, in which regions of gradient checkpointing are open, tensors written in place
have the name of their last write, and fused operations are taken apart into linears.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rana_fx.graph.checkpoint_regions import open_checkpoints
from rana_fx.graph.decompose_fused import unfuse
from rana_fx.graph.functionalize import redirect
from rana_fx.graph.linears import parameters_of


def prepare(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> None:
    """In place. Calibration, trial and rewrite have to find the same linears."""
    open_checkpoints(graph_module)
    redirect(graph_module)
    unfuse(graph_module, parameters_of(graph_module, example_inputs))
