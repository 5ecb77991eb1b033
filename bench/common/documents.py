"""Evaluation text with the document index of every token, which bootstrap intervals resample.

In: a text as ``rana_fx.evaluation.text`` reads it. Out: the same packed batches as ``batches_of`` gives, and for each the
document index of every token. Documents are packed back to back, so a sequence may hold several documents and a document may
span several sequences. ``Text.unit`` names what counts as a document:

    document   a row of the data set, if the data set has several rows
    article    a text without rows is split at its first-level headings, which WikiText writes as " = Title = "
    sequence   otherwise each packed sequence counts as one; intervals are then rather too narrow than too wide
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bench.common.calibrated import batches_of
from rana_fx.evaluation.text import load_texts, token_batches

_HEADING = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Text:
    """``documents``: per batch, (B, T), the document index of each token; padding has the index of the last token."""

    batches: list[dict[str, Tensor | bool]]
    documents: list[Tensor]
    unit: str


def read_text(source: str, tokenizer: Any, *, tokens: int, context: int) -> Text:
    """At most ``tokens`` tokens of a text, packed. Raises ColumnMissing, DatasetError."""
    batches = batches_of(source, tokenizer, tokens=tokens, context=context)
    shapes = [batch["input_ids"].shape for batch in batches]
    count = sum(shape.numel() for shape in shapes)
    starts, unit = _starts(load_texts(source), tokenizer, count)
    if len(starts) < 2:
        starts, unit = list(range(0, count, context)), "sequence"
    ids = torch.searchsorted(torch.tensor(starts), torch.arange(count), right=True) - 1
    parts = ids.split([shape.numel() for shape in shapes])
    return Text(batches, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)], unit)


def _starts(texts: list[str], tokenizer: Any, count: int) -> tuple[list[int], str]:
    """(index of the first token of each document that begins within ``count`` tokens, ``Text.unit``)."""
    if len(texts) == 1:
        return _headings(texts[0], tokenizer, count), "article"
    lengths: list[int] = []
    for text in texts:
        if sum(lengths) >= count:
            break
        # with the special tokens that packing adds; at a context of 1 there is no padding
        lengths.append(sum(len(batch["input_ids"]) for batch in token_batches([text], tokenizer, context=1)))
    starts = [0, *accumulate(lengths[:-1])]
    return [start for start in starts if start < count], "document"


def _headings(text: str, tokenizer: Any, count: int) -> list[int]:
    if not getattr(tokenizer, "is_fast", False):
        return []  # no character offsets of tokens
    places = tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"][:count]
    ends = torch.tensor([end for _, end in places])
    found = [match.start() for match in _HEADING.finditer(text)]
    if found and not text[: found[0]].strip():
        found = found[1:]
    # text before the first heading, if any, is a document of its own
    heads = torch.searchsorted(ends, torch.tensor(found), right=True).tolist()
    return sorted({0, *(head for head in heads if head < len(places))})
