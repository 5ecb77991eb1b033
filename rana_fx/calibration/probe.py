"""Run a model with something done at its linears: gradients taken there, or adapters tried, before any plan is made.

In: a model, its layout, and a step: (site, x, y) -> what takes y's place. Out: the model's output. The model runs under
``torch.compile`` with a backend that hands every linear of the budget to the step and otherwise runs eagerly, so any model
that can be calibrated can be rehearsed, and gradients flow where eager operations let them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx.calibration.batches import (
    call,
    count_tokens,
    evaluating,
    leading,
    mask_of,
    observing,
    padding_masks,
    part_of,
    real_rows,
    to_device,
)
from rana_fx.calibration.layout import Layout
from rana_fx.graph.linears import find_linears
from rana_fx.graph.normalize import prepare
from rana_fx.modules import device_of, names_of, unwrap

_EVERY = 8
_MOST_HELD = 2
_MOST_KEPT = 4
_PIECE = 2048  # tokens that the model is run on at a time: a backward pass holds what every layer made of them

Step = Callable[[str, Tensor, Tensor], Tensor]


class Stage:
    """A model ready to run with any step; traced once."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self._layout = layout
        self._names = names_of(model)
        self._masks: dict[str, Tensor] = {}
        self._step: Step | None = None
        self._compiled = torch.compile(model, backend=self._backend)

    def run(self, batch: Any, step: Step | None = None) -> Any:
        """The model's output for a batch as ``adapt`` takes them."""
        batch = to_device(batch, device_of(self._model))
        self._masks = padding_masks(batch)
        self._step = step
        try:
            return call(self._compiled, batch)
        finally:
            self._step = None

    def real(self, x: Tensor) -> Tensor:
        """Rows of an activation of the batch that runs, (tokens, features), padding left out."""
        return real_rows(x, self.mask(x))

    def mask(self, x: Tensor) -> Tensor | None:
        """The mask of real tokens among the rows of x, if the batch has one."""
        return mask_of(x, self._masks)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        prepare(gm, example_inputs)
        through: dict[fx.Node, fx.Node] = {}
        for linear in find_linears(gm, example_inputs, self._names).linears:
            site = self._layout.sites.get(linear.name)
            if site is None or not site.counted:
                continue
            x = through.get(linear.x, linear.x)  # a linear may read another one directly
            with gm.graph.inserting_after(linear.node):
                taken = gm.graph.call_function(self._through, (linear.name, x, linear.node))
            linear.node.replace_all_uses_with(taken)
            taken.args = (linear.name, x, linear.node)  # all uses but this one
            through[linear.node] = taken
        gm.recompile()
        return gm.forward

    def _through(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        return y if self._step is None else self._step(site, x, y)


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """A model and the batches that a recipe may run it on.

    ``held``: kept out of the sample, for judging choices; where there are too few batches, one that was sampled. Large batches
    of token ids come in pieces.
    """

    model: nn.Module
    batches: tuple[Any, ...]
    held: tuple[Any, ...]

    @contextmanager
    def opened(self, layout: Layout) -> Iterator[Stage]:
        """A ``Stage``. Inside, the model is in evaluation mode and its weights ask for no gradients; compiled code is dropped."""
        model = unwrap(self.model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with evaluating(model), observing(model):
            try:
                for parameter in trained:
                    parameter.requires_grad_(False)
                yield Stage(model, layout)
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)


class Keeper:
    """Passes batches on to calibration, keeps some for rehearsal, and holds every eighth back from the sample."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._kept: list[Any] = []
        self._held: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self._batches):
            if index % _EVERY == _EVERY - 1 and len(self._held) < _MOST_HELD:
                self._held.append(batch)
                continue
            if len(self._kept) < _MOST_KEPT:
                self._kept.append(batch)
            yield batch

    def rehearsal(self, model: nn.Module) -> Rehearsal:
        held = self._held or self._kept[-1:]
        return Rehearsal(model, _pieces(self._kept, 2 * _MOST_KEPT), _pieces(held, 2 * _MOST_HELD))


def _pieces(batches: Sequence[Any], most: int) -> tuple[Any, ...]:
    """At most so many pieces, from every batch equally many."""
    turns = itertools.zip_longest(*map(_split, batches), fillvalue=None)
    return tuple(itertools.islice((piece for turn in turns for piece in turn if piece is not None), most))


def _split(batch: Any) -> list[Any]:
    """A batch of texts in pieces of at most ``_PIECE`` tokens, or one text each; any other batch as it is."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return [batch]
    batch = to_device(batch, torch.device("cpu"))
    tokens, texts = count_tokens(batch, {}), leading(batch)
    if tokens <= _PIECE or texts is None:
        return [batch]
    size = max(1, _PIECE * texts // tokens)
    return [part_of(batch, start, start + size) for start in range(0, texts, size)]


def halves(batch: Any) -> list[Any]:
    """A batch in two; empty where it cannot be told along which dimension, or there is one text in it."""
    texts = leading(batch)
    if texts is None or texts < 2:
        return []
    middle = texts // 2
    return [part_of(batch, 0, middle), part_of(batch, middle, texts)]
