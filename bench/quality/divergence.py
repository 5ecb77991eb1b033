"""Divergence of an adapted model's predictions from the dense model's, token by token on the same text.

In: two functions called like the model, and a text. Out: mean KL divergence in nats per token, fraction of tokens with the same
most likely next token, and the increase of the mean loss with a 95 % bootstrap interval over documents: tokens of one document
are correlated, so its sequences are no independent samples. The loss of a token belongs to the document of the predicted token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.documents import Text
from rana_fx.calibration.batches import to_device
from rana_fx.evaluation.perplexity import Quality, evaluate

_RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """``interval``: 95 %, of the increase of the loss, from ``documents`` resampled units; ``resampled``: ``Text.unit``."""

    kl: float
    agreement: float
    interval: tuple[float, float]
    documents: int
    resampled: str


def compare(
    adapted: Callable[..., Any], dense: Callable[..., Any], text: Text, *, progress: bool, device: torch.device
) -> tuple[Quality, Comparison]:
    """Evaluate the adapted and the dense model on one text. Returns the adapted model's loss and the comparison."""
    counter = _Counter()
    documents = iter(text.documents)

    def forward(**batch: Any) -> Any:
        batch = to_device(batch, device)
        output = adapted(**batch)
        with torch.no_grad():
            counter.add(output.logits, dense(**batch).logits, batch["input_ids"], batch["attention_mask"], next(documents))
        return output

    quality = evaluate(forward, text.batches, progress=progress)
    return quality, counter.result(text.unit)


def by_document(forward: Callable[..., Any], text: Text, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """(sum of the losses, number of targets) of each document, fp64; ``interval`` takes differences of two models' sums."""
    sums = torch.zeros(1 + max(int(documents.max()) for documents in text.documents), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    with torch.no_grad():
        for batch, documents_BT in zip(text.batches, text.documents, strict=True):
            moved = to_device(batch, device)
            logits = forward(**moved).logits
            for row, ids, mask, documents in zip(
                logits, moved["input_ids"], moved["attention_mask"], documents_BT.to(device), strict=True
            ):
                real = (mask[1:] * mask[:-1]).bool()
                losses = nn.functional.cross_entropy(row[:-1][real].float(), ids[1:][real], reduction="none")
                place = documents[1:][real].cpu()
                sums.index_add_(0, place, losses.double().cpu())
                counts += place.bincount(minlength=len(counts))
    found = counts > 0
    return sums[found], counts[found]


class _Counter:
    """Sums of KL, equal predictions and loss differences over batches."""

    def __init__(self) -> None:
        self._kl = self._same = 0.0
        self._sums: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def add(self, adapted: Tensor, dense: Tensor, ids_BT: Tensor, mask_BT: Tensor, documents_BT: Tensor) -> None:
        for logits, reference, ids, mask, documents in zip(adapted, dense, ids_BT, mask_BT, documents_BT, strict=True):
            real = (mask[1:] * mask[:-1]).bool()
            log_q, log_p = (scores[:-1][real].float().log_softmax(-1) for scores in (logits, reference))
            target = ids[1:][real].unsqueeze(1)
            self._kl += float((log_p.exp() * (log_p - log_q)).sum())
            self._same += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            more = (log_p.gather(1, target) - log_q.gather(1, target)).squeeze(1).double().cpu()
            found, place = documents[1:][real.cpu()].unique(return_inverse=True)
            sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, place, more)
            for document, total, count in zip(found.tolist(), sums.tolist(), place.bincount().tolist(), strict=True):
                self._sums[document] = self._sums.get(document, 0.0) + total
                self._counts[document] = self._counts.get(document, 0) + count

    def result(self, unit: str) -> Comparison:
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64)
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        tokens = float(counts.sum())
        return Comparison(self._kl / tokens, self._same / tokens, interval(sums, counts), len(sums), unit)


def interval(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of sum(sums) / sum(counts), with one entry per document."""
    drawn = torch.randint(len(sums), (_RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
