"""How far finished plans move a model's predictions on held-out documents: points of ``Plan.curve``.

In: a model, its layout and batches that nothing else used. Out: for the adapters of a plan the divergence from the dense model,
and the increases of loss and perplexity, with intervals over documents: entries of the batches' first dimension. Adapters are
simulated (simulate.py): what they compute is what the compiled model is recorded from, so it differs by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rana_fx.adapter import Adapter
from rana_fx.calibration.autocast import autocast_as
from rana_fx.calibration.holdout import Holdout
from rana_fx.calibration.instrumented import InstrumentedModel
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.sensitivity import compared, logits_of, rows_at_once
from rana_fx.curve import Interval
from rana_fx.errors import NonFinite
from rana_fx.recipes.intervals import LEAST, mean_interval, perplexity_interval
from rana_fx.recipes.simulate import AdapterSimulator

_MOST_KEPT = 1e9  # bytes of the dense model's outputs, which are otherwise computed again for each plan


@dataclass(frozen=True)
class Measured:
    """Of one plan; see ``rana_fx.curve.CurvePoint``. None where there is no such thing, or too few documents for intervals.

    agreement: share of the tokens for which both models find the same class, or next token, most probable.
    dense_loss, adapted_loss: next-token loss of each model, nats per token; None where it predicts no next tokens.
    """

    kl: Interval | None
    loss: Interval | None
    perplexity: Interval | None
    documents: int
    tokens: int
    agreement: Interval | None = None
    dense_loss: float | None = None
    adapted_loss: float | None = None


@contextmanager
def held_out_quality(model: nn.Module, layout: Layout, batches: Sequence[Any]) -> Iterator[HeldOutQuality]:
    """Measures on these batches; the model is in evaluation mode inside."""
    with Holdout(model, (), tuple(batches)).instrumented(layout) as stage:
        yield HeldOutQuality(stage, layout, batches)


class HeldOutQuality:
    """Measures one plan after the other."""

    def __init__(self, model: InstrumentedModel, layout: Layout, batches: Sequence[Any]) -> None:
        self._model, self._layout, self.batches = model, layout, batches
        self._dense: dict[int, Any] = {}
        self._room = _MOST_KEPT
        self._alone: _Sums | None = None

    @property
    def has_logits(self) -> bool:
        """Whether the model's outputs have logits: otherwise there is no divergence."""
        return self._of_dense().has_logits

    @property
    def has_targets(self) -> bool:
        """Whether logits are those of next tokens: otherwise there is no loss."""
        return bool(self._of_dense().targets)

    @property
    def documents(self) -> int:
        """Number of documents with a real token."""
        return self._of_dense().documents

    @property
    def predicted(self) -> int:
        """Number of documents with a next token."""
        return sum(count > 0 for count in self._of_dense().targets)

    def measure(self, adapters: Sequence[Adapter]) -> Measured:
        """The model with these adapters against the dense one."""
        return self._sums(adapters).result()

    def _of_dense(self) -> _Sums:
        if self._alone is None:
            self._alone = self._sums(())
        return self._alone

    @torch.no_grad()
    def _sums(self, adapters: Sequence[Adapter]) -> _Sums:
        sums, simulator = _Sums(), AdapterSimulator(self._model, self._layout, adapters)
        with autocast_as(()):
            for index, batch in enumerate(self.batches):
                dense = self._dense_of(index, batch)
                # without adapters it is the dense model, which need not run again
                output = self._model.run(batch, simulator.step) if adapters else dense
                simulator.clear()
                sums.add(output, dense, batch, self._model)
        return sums

    def _dense_of(self, index: int, batch: Any) -> Any:
        found = self._dense.get(index)
        if found is None:
            found = compared(self._model.run(batch))
            logits = logits_of(found)
            needed = 0 if logits is None else logits.numel() * logits.element_size()
            if needed <= self._room:
                self._room -= needed
                self._dense[index] = found
        return found


class _Sums:
    """Of each document, over its real tokens: divergence, and losses of both models where there are next tokens."""

    def __init__(self) -> None:
        self.kl: list[float] = []
        self.same: list[float] = []
        self.tokens: list[int] = []
        self.dense: list[float] = []
        self.adapted: list[float] = []
        self.targets: list[int] = []
        self.has_logits = False

    @property
    def documents(self) -> int:
        return len(self.kl)

    def add(self, output: Any, dense: Any, batch: Any, model: InstrumentedModel) -> None:
        """One batch; ``model`` ran it last, so that its padding is known."""
        logits, reference = logits_of(output), logits_of(dense)
        if logits is None or reference is None:
            return
        self.has_logits = True
        ids_BT = _ids(batch)
        logits, reference, real_BT = _by_document(logits, reference, model.mask(logits), ids_BT)
        has_next = ids_BT is not None and real_BT.shape == ids_BT.shape
        for document, real_T in enumerate(real_BT):
            if not bool(real_T.any()):
                continue
            log_q, log_p = logits[document], reference[document]
            self.kl.append(_divergence(log_q[real_T], log_p[real_T]))
            self.same.append(float((log_q[real_T].argmax(-1) == log_p[real_T].argmax(-1)).sum()))
            self.tokens.append(int(real_T.sum()))
            if has_next:
                assert ids_BT is not None
                counted = real_T[1:] & real_T[:-1]
                target = ids_BT[document].to(logits.device)[1:][counted]
                self.targets.append(len(target))
                self.dense.append(_loss(log_p[:-1][counted], target))
                self.adapted.append(_loss(log_q[:-1][counted], target))

    def result(self) -> Measured:
        """Raises NonFinite."""
        bad = sum(not math.isfinite(value) for value in (*self.kl, *self.dense, *self.adapted))
        if bad:
            raise NonFinite(site="the model's output", count=bad, what="losses", shape=f"({self.documents} documents)")
        kl, same, tokens = _kept(self.tokens, self.kl, self.same, self.tokens)
        dense, adapted, targets = _kept(self.targets, self.dense, self.adapted, self.targets)
        enough = len(targets) >= LEAST
        return Measured(
            mean_interval(kl, tokens) if len(tokens) >= LEAST else None,
            mean_interval(adapted - dense, targets) if enough else None,
            perplexity_interval(dense, adapted, targets) if enough else None,
            self.documents,
            sum(self.tokens),
            mean_interval(same, tokens) if len(tokens) >= LEAST else None,
            float(dense.sum() / targets.sum()) if len(targets) else None,
            float(adapted.sum() / targets.sum()) if len(targets) else None,
        )


def _kept(counts: Sequence[int], *columns: Sequence[float]) -> list[Tensor]:
    """Columns as fp64, without documents that count nothing."""
    chosen = torch.tensor(counts, device="cpu") > 0
    return [torch.tensor(column, dtype=torch.float64, device="cpu")[chosen] for column in columns]


def _ids(batch: Any) -> Tensor | None:
    """(B, T), of a batch of named tensors or of ids alone; None: none, or the input of a decoder is another one."""
    if isinstance(batch, Tensor):
        return batch if batch.dim() == 2 and not batch.is_floating_point() else None
    if not isinstance(batch, Mapping) or any(str(key).startswith("decoder_") for key in batch):
        return None
    ids = torch.as_tensor(batch["input_ids"]) if "input_ids" in batch else None
    return ids[None] if ids is not None and ids.dim() == 1 else ids


def _by_document(logits: Tensor, reference: Tensor, mask: Tensor | None, ids_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as (documents, positions, classes), and which positions are real, (documents, positions)."""
    shape = mask.shape if mask is not None else logits.shape[:-1]
    if mask is None and logits.dim() == 2:
        flat = ids_BT is not None and ids_BT.numel() == len(logits)
        shape = ids_BT.shape if flat and ids_BT is not None else torch.Size((len(logits), 1))
    made = (values.reshape(*shape, values.shape[-1]) for values in (logits, reference))
    real = torch.ones(shape, dtype=torch.bool, device=logits.device) if mask is None else mask.to(logits.device)
    return (*made, real)  # type: ignore[return-value]


def _divergence(rows: Tensor, reference: Tensor) -> float:
    total, most = 0.0, rows_at_once(rows.shape[-1])
    for part, wanted in zip(rows.split(most), reference.split(most), strict=True):
        log_q, log_p = part.float().log_softmax(-1), wanted.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return total


def _loss(rows: Tensor, target: Tensor) -> float:
    most = rows_at_once(rows.shape[-1])
    parts = zip(rows.split(most), target.split(most), strict=True)
    return sum(float(nn.functional.cross_entropy(part.float(), ids, reduction="sum")) for part, ids in parts if len(ids))
