"""Text to fine-tune on: packed into sequences in random order, in several epochs if it is shorter than the training.

In: a data set and a tokenizer. Out: batches of full sequences, gathered on access, and held-out batches. Documents are packed as
by ``rana_fx.evaluation.text.token_batches``, and encoded in large groups, which uses all cores. The command ``rana-fx finetune``
refuses to repeat a text; this bench repeats it, and its rows give the number of epochs (``passes``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rana_fx.errors import TooLittleText
from rana_fx.evaluation.text import documents_of, load_texts

_DOCUMENTS = 512  # encoded at a time

Batch = dict[str, Tensor]


@dataclass(eq=False)
class Batches(Sequence[Batch]):
    """Rows of ``ids_ST`` in an ``order``, ``size`` at a time."""

    ids_ST: Tensor
    order: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.order) // self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"input_ids": self.ids_ST[self.order[index * self.size : (index + 1) * self.size]].long()}


@dataclass(frozen=True, eq=False)
class TrainingText:
    """``passes``: epochs over the text, fractional; ``held_out``: batches that are not trained on."""

    batches: Batches
    held_out: list[Batch]
    passes: float


def training_text(
    source: str, tokenizer: Any, *, tokens: int, held_out: int, context: int, batch_size: int, seed: int
) -> TrainingText:
    """Sequences of a text, its documents in an order drawn from ``seed``; the last ones are held out. Raises TooLittleText."""
    at_once = context * batch_size
    steps, testing = tokens // at_once, -(-held_out // at_once)
    asked = (steps + testing) * at_once
    texts = load_texts(source)
    random.Random(seed).shuffle(texts)
    ids = _encoded(texts, tokenizer, enough=asked)
    sequences = ids[: len(ids) // context * context].view(-1, context)
    held, kept = sequences[len(sequences) - testing * batch_size :], sequences[: len(sequences) - testing * batch_size]
    if not steps or len(kept) < batch_size or len(held) < testing * batch_size:
        facts: dict[str, Any] = {"trained": steps * at_once, "held_out": testing * at_once, "batch": at_once}
        raise TooLittleText(source=source, got=len(ids), expected=asked, **facts)
    generator = torch.Generator().manual_seed(seed)
    orders, wanted = [], steps * batch_size
    while sum(map(len, orders)) < wanted:
        orders.append(torch.randperm(len(kept), generator=generator))
    batches = Batches(kept, torch.cat(orders)[:wanted], batch_size)
    return TrainingText(batches, list(Batches(held, torch.arange(len(held)), batch_size)), wanted / len(kept))


def _encoded(texts: list[str], tokenizer: Any, *, enough: int) -> Tensor:
    """Token ids of documents, concatenated, int32; encodes until there are ``enough``."""
    parts: list[Tensor] = []
    count = 0
    for start in range(0, len(texts), _DOCUMENTS):
        if count >= enough:
            break
        for document in documents_of(texts[start : start + _DOCUMENTS], tokenizer):
            parts.append(torch.tensor(document, dtype=torch.int32))
            count += len(document)
    return torch.cat(parts)
