"""Matrices of a model that no traced graph reads: those that no batch reads, and those that are read outside of the graphs.

In: a model, the Parameters that its graphs read, and some of the batches. Out: an ``Unread`` for every module all of whose
matrices have the same status, so that a tower without a batch is one entry. Matrices that are read outside of the graphs
(functions under ``torch.compiler.disable``, code on which tracing breaks) are found by running a batch eagerly and recording the
arguments of all operations.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rana_fx.calibration.batches import call
from rana_fx.calibration.layout import Unread
from rana_fx.modules import device_of, unwrap, weights_of

_MOST_RUNS = 4  # largest number of batches that are also run eagerly


class UnreadMatrices:
    """The matrices of a model that no graph has read so far, updated after each batch.

    ``read``: ids of the tensors that traced graphs read.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._matrices = _matrices(model)
        self._eager: set[int] = set()
        self._runs = 0
        self.read: set[int] = set()

    def left(self) -> dict[str, int]:
        """Names of the matrices that no graph has read so far -> their ids."""
        return {name: key for name, key in self._matrices.items() if key not in self.read}

    def run_eagerly(self, batch: Any) -> None:
        """Run a batch outside of torch.compile, if matrices are left, and record which of them it reads."""
        wanted = set(self.left().values()) - self._eager
        if not wanted or self._runs == _MOST_RUNS:
            return
        self._runs += 1
        device = device_of(self._model)
        forked = [device] if device.type == "cuda" else []
        seen = _Arguments(wanted)
        # random numbers drawn by the model later must not depend on this run
        with torch.random.fork_rng(forked), torch.compiler.set_stance("force_eager"), warnings.catch_warnings(), seen:
            warnings.simplefilter("ignore")
            # a model that cannot run eagerly: the arguments until the error are recorded
            with contextlib.suppress(Exception):
                call(self._model, batch)
        self._eager |= seen.found

    def result(self) -> tuple[Unread, ...]:
        """All matrices that are left, by module."""
        left = self.left()
        fates = {name: "read" for name in self._matrices} | {
            name: "eager" if key in self._eager else "never" for name, key in left.items()
        }
        inside: dict[str, set[str]] = {}
        for name, fate in fates.items():
            for module in _modules_around(name):
                inside.setdefault(module, set()).add(fate)
        counts: dict[tuple[str, str], int] = {}
        for name in left:
            # the outermost module all of whose matrices have this status
            module = next((found for found in _modules_around(name) if len(inside[found]) == 1), name)
            counts[module, fates[name]] = counts.get((module, fates[name]), 0) + 1
        return tuple(Unread(module, count, fate == "eager") for (module, fate), count in counts.items())


class _Arguments(TorchFunctionMode):
    """Collects the ids of the given tensors that are arguments of any operation."""

    def __init__(self, wanted: set[int]) -> None:
        super().__init__()
        self._wanted = wanted
        self.found: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        given: Any = (args, kwargs or {})
        leaves: list[Any] = optree.tree_leaves(given)
        self.found |= {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)} & self._wanted
        return func(*args, **(kwargs or {}))


def _matrices(model: nn.Module) -> dict[str, int]:
    """Names of the Parameters that linears may multiply by -> their ids, each once; without embeddings and factors of a plan."""
    others = set()
    for module in unwrap(model).modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or type(module).__module__.partition(".")[0] == "rana_fx":
            others |= {id(parameter) for parameter in module.parameters(recurse=False)}
    found: dict[int, str] = {}
    for name, weight in weights_of(model).items():
        if nn.parameter.is_lazy(weight):  # without a shape before the first run
            continue
        if weight.dim() == 2 and min(weight.shape) > 1 and weight.is_floating_point() and id(weight) not in others:
            found.setdefault(id(weight), name)
    return {name: key for key, name in found.items()}


def _modules_around(name: str) -> list[str]:
    """Names of the modules that contain a Parameter, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]
