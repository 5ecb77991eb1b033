"""How far an adapted model's predictions are from the dense model's, token by token, on the same text.

In: a model with a plan attached and batches. Out: mean KL divergence, share of tokens with the same most likely next token, the
increase of the loss with an interval by bootstrap over sequences, and what the plan kept. The dense model is the module itself,
called eagerly: a plan acts in compiled graphs alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rana_fx.evaluate import Quality, evaluate
from rana_fx.measure import Measurement, measuring

_RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """``interval``: of the increase of the loss, 95 %."""

    kl: float
    agreement: float
    interval: tuple[float, float]


def compare(model: nn.Module, batches: Iterable[dict[str, Tensor]], *, progress: bool) -> tuple[Quality, Measurement, Comparison]:
    """One run of the adapted and of the dense model."""
    with measuring(model) as meter:
        counter = _Counter()

        def forward(**batch: Any) -> Any:
            output = meter(**batch)
            with torch.no_grad():
                counter.add(output.logits, model(**batch).logits, batch["input_ids"], batch["attention_mask"])
            return output

        quality = evaluate(forward, batches, progress=progress)
        return quality, meter.result(), counter.result()


class _Counter:
    def __init__(self) -> None:
        self._kl = self._same = 0.0
        self._sequences: list[tuple[float, int]] = []

    def add(self, adapted: Tensor, dense: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> None:
        for logits, reference, ids, mask in zip(adapted, dense, ids_BT, mask_BT, strict=True):
            real = (mask[1:] * mask[:-1]).bool()
            log_q, log_p = (scores[:-1][real].float().log_softmax(-1) for scores in (logits, reference))
            target = ids[1:][real].unsqueeze(1)
            self._kl += float((log_p.exp() * (log_p - log_q)).sum())
            self._same += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            self._sequences.append((float((log_p.gather(1, target) - log_q.gather(1, target)).sum()), len(target)))

    def result(self) -> Comparison:
        sums, counts = torch.tensor(self._sequences, dtype=torch.float64).unbind(1)
        drawn = torch.randint(len(sums), (_RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(0))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        tokens = float(counts.sum())
        return Comparison(self._kl / tokens, self._same / tokens, (low, high))
