"""One trace by Dynamo for everything that instruments a model: calibration, then a measurement of the plan made of it.

For tests over many architectures, where tracing takes most of the time. Each ``Probe`` instruments a copy of its own of every
traced graph; guards are those of the first trace, and a call that they do not hold for is traced again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import fx

from rana_fx.calibration.probe import Probe


class _Trace:
    """A compiled model whose graphs run as the current probe instruments them."""

    def __init__(self, model):
        self.graphs, self.functions, self.probe = [], {}, None
        self._compiled = torch.compile(model, backend=self._backend)

    def _backend(self, module, inputs):
        index = len(self.graphs)
        self.graphs.append((_copied(module), inputs))
        self.functions[self.probe, index] = self.probe._backend(module, inputs)
        return lambda *args: self._function(index)(*args)

    def _function(self, index):
        key = self.probe, index
        if key not in self.functions:
            module, inputs = self.graphs[index]
            self.functions[key] = self.probe._backend(_copied(module), inputs)
        return self.functions[key]

    def called_by(self, probe):
        def call(*args, **kwargs):
            self.probe = probe
            return self._compiled(*args, **kwargs)

        return call


def _copied(module):
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


@contextlib.contextmanager
def one_trace(model) -> Iterator[list]:
    """Yields the traced graphs and their inputs."""
    trace, create = _Trace(model), Probe.__init__

    def created(self, probed, instrument):
        create(self, probed, instrument)
        assert probed is model
        self._compiled = trace.called_by(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "__init__", created)
        # a probe drops the code of others
        patch.setattr(torch._dynamo, "reset", lambda: None)
        yield trace.graphs
