"""Batches that a recipe may run the model on: some of the calibration text, and a holdout set to judge choices on.

In: the batches that ``adapt`` is given, passed on to calibration one by one. Out: a ``Holdout``. Every eighth batch is held out
of the samples; a few are kept, large ones of token ids in pieces.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from rana_fx.calibration.autocast import State, autocast_now
from rana_fx.calibration.batches import count_tokens, digest_of, leading, padding_masks, part_of, to_device
from rana_fx.calibration.instrumented import InstrumentedModel
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.probe import probing
from rana_fx.modules import unwrap

_EVERY = 8
_MOST_HELD = 2
_MOST_KEPT = 4
_MOST_KINDS = 16  # of batches that run different linears
_PIECE = 2048  # tokens that the model is run on at a time: a backward pass holds what every layer made of them


@dataclass(frozen=True, eq=False)
class Holdout:
    """A model and the batches that a recipe may run it on.

    ``batches``: part of the sampled text. ``held``: held out of the sample, to judge choices on; where there are too few
    batches, one that was sampled.
    """

    model: nn.Module
    batches: tuple[Any, ...]
    held: tuple[Any, ...]
    autocast: State = field(default_factory=autocast_now)  # that the model was calibrated under

    @contextmanager
    def instrumented(self, layout: Layout) -> Iterator[InstrumentedModel]:
        """The model, ready to run with a step at its linears.

        Inside, it is in evaluation mode and its weights require no gradients; what was compiled is dropped at the end.
        """
        model = unwrap(self.model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with probing(model):
            try:
                for parameter in trained:
                    parameter.requires_grad_(False)
                yield InstrumentedModel(model, layout, self.autocast)
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)

    def opened(self, layout: Layout) -> AbstractContextManager[InstrumentedModel]:
        """The old name of ``instrumented``, for one release."""
        warnings.warn("Holdout.opened is named instrumented now", DeprecationWarning, stacklevel=2)
        return self.instrumented(layout)


class Tee:
    """Iterates over batches for calibration, keeps a few of them, and holds every eighth out.

    ``ran`` records the linears of each batch. Where batches run different linears, some of each kind are kept, chosen by content,
    so that the order of batches does not matter; calibration then also samples the held-out batches.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._kept: list[Any] = []
        self._held: list[Any] = []
        self._last: Any = None  # the batch that came last
        # linears that run together -> digest -> a batch that runs them
        self._kinds: dict[frozenset[str], dict[str, Any]] = {}

    def __len__(self) -> int:
        """Number of batches, held-out ones included. Raises TypeError where it is not known before they come."""
        return len(cast(Sized, self._batches))

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self._batches):
            # what has no tokens judges nothing
            if index % _EVERY == _EVERY - 1 and len(self._held) < _MOST_HELD and count_tokens(batch, padding_masks(batch)):
                self._held.append(batch)
                continue
            if len(self._kept) < _MOST_KEPT:
                self._kept.append(batch)
            self._last = batch
            yield batch

    def held_out(self) -> Iterator[Any]:
        """The held-out batches, one by one, after the iteration over all others."""
        for batch in self._held:
            self._last = batch
            yield batch

    def ran(self, linears: frozenset[str]) -> None:
        """Record the names of the linears that the last batch of ``__iter__`` or of ``held_out`` ran."""
        known = frozenset[str]().union(*self._kinds)
        if linears not in self._kinds and len(self._kinds) >= (_MOST_KEPT if linears <= known else _MOST_KINDS):
            return
        found = self._kinds.setdefault(linears, {})
        found[digest_of(self._last)] = self._last
        if len(found) > _MOST_KEPT + 1:
            del found[max(found)]

    @property
    def mixed(self) -> bool:
        """Whether batches ran different linears."""
        return len(self._kinds) > 1

    def holdout(self, model: nn.Module) -> Holdout:
        """What was kept and held out so far."""
        kept, held = self._kept, self._held or self._kept[-1:]
        if self.mixed:
            kinds = sorted(self._kinds, key=lambda linears: (-len(linears), sorted(linears)))
            ordered = [[self._kinds[kind][key] for key in sorted(self._kinds[kind])] for kind in kinds]
            # the last batch of a kind is held out, where the kind has more than one
            held = [found[-1] for found in ordered[: 2 * _MOST_HELD]]
            turns = itertools.zip_longest(*(found[: max(1, len(found) - 1)] for found in ordered), fillvalue=None)
            kept = [batch for turn in turns for batch in turn if batch is not None][: 2 * _MOST_KEPT]
        return Holdout(model, _pieces(kept, 2 * _MOST_KEPT), _pieces(held, 2 * _MOST_HELD))


def _pieces(batches: Sequence[Any], most: int) -> tuple[Any, ...]:
    """At most so many pieces, from every batch equally many."""
    turns = itertools.zip_longest(*map(in_pieces, batches), fillvalue=None)
    return tuple(itertools.islice((piece for turn in turns for piece in turn if piece is not None), most))


def in_pieces(batch: Any) -> list[Any]:
    """A batch of texts in pieces of at most ``_PIECE`` tokens, or one text each; any other batch as it is."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return [batch]
    batch = to_device(batch, torch.device("cpu"))
    tokens, texts = count_tokens(batch, {}), leading(batch)
    if tokens <= _PIECE or texts is None:
        return [batch]
    size = max(1, _PIECE * texts // tokens)
    return [part_of(batch, start, start + size) for start in range(0, texts, size)]
