"""The text of ``rana-fx adapt --budgets`` and of its targets: batches to calibrate on, and documents to measure plans on.

In: documents in random order. Out: packed batches, and a batch row for each held-out document: its first tokens. Rows are thus
independent of each other, as intervals over documents have to assume. Held-out documents are taken from the end: of a data set
with more text than ``--tokens``, the same batches are calibrated on as with ``--budget`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rana_fx.recipes.intervals import LEAST

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MOST = 64  # documents, and at most a fourth of all

Batches = list[dict[str, "Tensor"]]


def calibration_and_held_out(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, tokens: int, context: int, batch_size: int
) -> tuple[Batches, Batches | None]:
    """(batches to calibrate on, batches to measure on; None: of so few documents batches have to be withheld)."""
    from rana_fx.evaluation.text import token_batches

    count = _held(texts)
    if not count:
        return token_batches(texts, tokenizer, tokens=tokens, context=context, batch_size=batch_size), None
    batches = token_batches(texts[:-count], tokenizer, tokens=tokens, context=context, batch_size=batch_size)
    return batches, document_rows(texts[-count:], tokenizer, context=context, batch_size=batch_size)


def refinement_batches(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    after: int,
    tokens: int,
    context: int,
    batch_size: int,
    measured: bool,
) -> Batches | None:
    """Batches to refine a plan on: of the text after the first ``after`` tokens; None where too little follows.

    ``tokens``: to train on; a third as many more are for judging. ``measured``: documents are held out of all this, as above.
    """
    from rana_fx.evaluation.text import token_batches

    texts = texts[: len(texts) - _held(texts)] if measured else texts
    skipped = -(-after // (context * batch_size))
    count = max(-(-tokens * 4 // 3), 4 * LEAST * context)
    whole = skipped * context * batch_size + count
    batches = token_batches(texts, tokenizer, tokens=whole, context=context, batch_size=batch_size)[skipped:]
    return batches if sum(len(batch["input_ids"]) for batch in batches) >= 4 * LEAST else None


def _held(texts: Sequence[str]) -> int:
    """How many documents are held out: none of so few that they would be too few for intervals."""
    count = min(MOST, len(texts) // 4)
    return count if count >= LEAST else 0


def rows_of(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, tokens: int, context: int, batch_size: int
) -> tuple[Batches, bool]:
    """(batches to measure on, whether each row is a document of its own): else rows are packed, of too few documents.

    Of at least ``tokens`` tokens and as many documents as intervals need, where there are so many.
    """
    from rana_fx.evaluation.text import token_batches

    if len(texts) < LEAST:
        return token_batches(texts, tokenizer, tokens=tokens, context=context, batch_size=batch_size), False
    batches: Batches = []
    count = 0
    for start in range(0, len(texts), batch_size):
        if count >= tokens and start >= LEAST:
            break
        made = document_rows(texts[start : start + batch_size], tokenizer, context=context, batch_size=batch_size)
        count += sum(int(batch["attention_mask"].sum()) for batch in made)
        batches += made
    return batches, True


def document_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, context: int, batch_size: int) -> Batches:
    """Batches of (B, T), T <= ``context``, a row for each document; padded on the right."""
    import torch

    from rana_fx.evaluation.text import token_batches

    rows = [row for text in texts for row in token_batches([text], tokenizer, tokens=context, context=context)]
    batches = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        longest = max(int(row["attention_mask"].sum()) for row in some)
        batches.append({key: torch.cat([row[key][:, :longest] for row in some]) for key in some[0]})
    return batches
