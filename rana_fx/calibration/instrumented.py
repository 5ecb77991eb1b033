"""The dense model with something done at its linears: gradients taken there, or candidate adapters simulated.

In: a model, its layout, and a step: (site, x, y) -> what replaces y, where y = linear(x), of any leading dimensions. Out: the
model's output. The step is called at every linear that the budget counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, fx, nn

from rana_fx.calibration.autocast import State, autocast_as
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.probe import Probe
from rana_fx.graph.linears import find_linears
from rana_fx.graph.normalize import prepare
from rana_fx.graph.transforms import batched, is_wrapped, outside, unbatched
from rana_fx.modules import names_of

Step = Callable[[str, Tensor, Tensor], Tensor]


class InstrumentedModel:
    """Runs with any step; traced once."""

    def __init__(self, model: nn.Module, layout: Layout, autocast: State | None = None) -> None:
        """``autocast``: to run the model under, in place of the caller's."""
        self._layout = layout
        self._autocast = autocast
        self._names = names_of(model)
        self._step: Step | None = None
        self._probe = Probe(model, self._instrument)

    def run(self, batch: Any, step: Step | None = None) -> Any:
        """The model's output for a batch as ``adapt`` takes them; without a step, the dense model's."""
        self._step = step
        try:
            with nullcontext() if self._autocast is None else autocast_as(self._autocast):
                return self._probe.run(batch)
        finally:
            self._step = None

    def real(self, x: Tensor) -> Tensor:
        """Rows of an activation of the batch that runs, (tokens, features), detached, padding left out."""
        return self._probe.real(x)

    def mask(self, x: Tensor) -> Tensor | None:
        """The mask of real tokens among the rows of x, if the batch has one."""
        return self._probe.mask(x)

    def _instrument(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        prepare(graph_module, example_inputs)
        graph = graph_module.graph
        replaced: dict[fx.Node, fx.Node] = {}
        for linear in find_linears(graph_module, example_inputs, self._names).linears:
            site = self._layout.sites.get(linear.name)
            if site is None or not site.counted:
                continue
            x = replaced.get(linear.x, linear.x)  # a linear may read another one directly
            with graph.inserting_after(linear.node):
                taken = graph.call_function(self._at_linear, (linear.name, x, linear.node))
            linear.node.replace_all_uses_with(taken)
            taken.args = (linear.name, x, linear.node)  # all uses but this one
            replaced[linear.node] = taken

    def _at_linear(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        if self._step is None or not is_wrapped(y):
            return y if self._step is None else self._step(site, x, y)
        with outside(y):
            made = self._step(site, unbatched(x), unbatched(y))
        again = batched(made, y)
        return y if again is None else again
