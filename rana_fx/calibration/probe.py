"""Run a model under torch.compile with functions called at chosen nodes of its graphs; nothing else is compiled.

In: a model and ``instrument``, which is given every traced graph once and edits it in place, usually by ``call_before`` on some
nodes. Out: the model's own output, computed eagerly, so that gradients flow where eager operations let them. A ``Probe`` moves
batches to the model's device and leaves padding out of activations. Calibration, the instrumented model, measurement
and re-thresholding are users of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx.calibration.batches import call, count_tokens, evaluating, mask_of, observing, padding_masks, real_rows, to_device
from rana_fx.calibration.compiling import check_backend_is_called, check_compiling, own_backends
from rana_fx.modules import device_of

Instrument = Callable[[fx.GraphModule, Sequence[Any]], None]


class Probe:
    """A model that runs with its graphs instrumented; each is traced once.

    Args:
        model: not wrapped (``rana_fx.modules.unwrap``), and to be run inside ``probing``.
        instrument: (graph module, its example inputs) -> None; edits the graph before it first runs.
    """

    def __init__(self, model: nn.Module, instrument: Instrument) -> None:
        self._model, self._instrument = model, instrument
        self._compiled = torch.compile(model, backend=self._backend)
        self._traced = False
        self.masks: dict[str, Tensor] = {}  # of the current batch, by the names of ``padding_masks``

    def run(self, batch: Any) -> Any:
        """The model's output for a batch as ``adapt`` takes them."""
        return self._checked(call(self._compiled, self.load(batch)))

    def load(self, batch: Any) -> Any:
        """The batch on the model's device; its padding is what ``mask`` and ``real`` go by from now on."""
        batch = to_device(batch, device_of(self._model))
        self.masks = padding_masks(batch)
        return batch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for the arguments of one call; padding is read from named arguments."""
        args, kwargs = to_device((args, kwargs), device_of(self._model))
        self.masks = padding_masks(kwargs)
        return self._checked(self._compiled(*args, **kwargs))

    def _checked(self, output: Any) -> Any:
        """The output, after a check that a graph was traced. Raises CompilationDisabled."""
        if not self._traced:
            check_backend_is_called()
            self._traced = True  # no part of the model is ever in a graph
        return output

    def tokens(self, batch: Any) -> int:
        """Tokens of a batch that ``load`` returned, padding not counted."""
        return count_tokens(batch, self.masks)

    def real(self, x: Tensor) -> Tensor:
        """Rows of an activation of the batch that runs, (tokens, features), detached, padding left out."""
        return real_rows(x, self.mask(x))

    def mask(self, x: Tensor) -> Tensor | None:
        """The mask of real tokens among the rows of x, if the batch has one of so many."""
        return mask_of(x, self.masks)

    def _backend(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], **_: object) -> Callable[..., Any]:
        self._traced = True
        self._instrument(graph_module, example_inputs)
        graph_module.recompile()
        return graph_module.forward


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode, and only a probe compiles; its code is dropped at the end.

    Raises:
        CompilationDisabled.
    """
    check_compiling()
    with evaluating(model), observing(model), own_backends():
        yield


def call_before(node: fx.Node, function: Callable[..., None], *args: Any) -> None:
    """Call ``function`` on nodes and constants right before ``node`` is computed."""
    with node.graph.inserting_before(node):
        node.graph.call_function(function, args)
