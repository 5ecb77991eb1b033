"""The loss of each variant of ``bench.decode`` on one text, beside its speed (``--text``).

In: a text file and a checkpoint's tokenizer, then the variants of a run. Out: mean loss in nats a token and perplexity, over
windows of 512 tokens without padding; every engine is fed the same token ids, and ``rana_fx.evaluation`` sums all losses. Where
the dense model came before: the increase of the loss and the KL divergence from its predictions, with 95 % intervals over
windows (rana_fx/recipes/intervals.py), for which windows must be at least eight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.models import SHAPES
from rana_fx.errors import InvalidOption
from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted
from rana_fx.evaluation.text import load_texts, token_batches
from rana_fx.recipes.intervals import LEAST, mean_interval

WINDOW = 512
DENSE = "dense"


@dataclass(eq=False)
class Text:
    """Windows of token ids, and the losses measured on them, by name. ``dense``: what the dense model predicts."""

    windows: list[dict[str, Tensor]]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    dense: Predictions | None = None

    def loss(self, name: str, forward: Callable[..., Any], *, adapted: bool = False) -> dict[str, Any]:
        """Facts of a row; measured once for each name.

        Args:
            forward: a model, or what is called like one. adapted: it is a model with a plan, which runs with reference kernels.
        """
        if name not in self.found:
            made = Predictions(kept=name == DENSE, against=self.dense)
            if adapted:
                assert isinstance(forward, nn.Module)
                quality, _ = evaluate_adapted(forward, self.windows, progress=False, watch=made.watch)
            else:
                quality = evaluate(forward, self.windows, progress=False, watch=made.watch)
            self.dense = made if name == DENSE else self.dense
            self.found[name] = asdict(quality) | made.differences()
        return self.found[name]


@dataclass(eq=False)
class Predictions:
    """Sums of losses, and of divergences from those of ``against``, by window.

    kept: whether log probabilities are, (tokens, vocabulary) fp32 of each window on the CPU.
    """

    kept: bool
    against: Predictions | None
    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    log_probabilities: list[Tensor] = field(default_factory=list)

    def watch(self, logits: Tensor, batch: dict[str, Tensor]) -> None:
        """Take the next window, one sequence, (1, T, V)."""
        found_TV = logits[0, :-1].float().log_softmax(-1).cpu()
        self.losses.append(float(-found_TV.gather(1, batch["input_ids"][0, 1:, None].cpu()).double().sum()))
        if self.against is not None:
            dense_TV = self.against.log_probabilities[len(self.counts)]
            self.divergences.append(float((dense_TV.exp() * (dense_TV - found_TV)).double().sum()))
        self.counts.append(len(found_TV))
        if self.kept:
            self.log_probabilities.append(found_TV)

    def differences(self) -> dict[str, Any]:
        """``delta`` and ``kl`` as (mean, low, high); nothing without the dense model, or with too few windows."""
        if self.against is None or len(self.counts) < LEAST:
            return {}
        counts_N, losses_N, kl_N = (torch.tensor(given).double() for given in (self.counts, self.losses, self.divergences))
        delta = mean_interval(losses_N - torch.tensor(self.against.losses).double(), counts_N)
        return {"delta": astuple(delta), "kl": astuple(mean_interval(kl_N, counts_N))}


def read_text(model: str, text: Path, tokens: int) -> Text:
    """The first ``tokens`` tokens of the text, by the tokenizer of the checkpoint.

    Raises:
        InvalidOption: the model has random weights, or the text is too short. DatasetError: the text cannot be read.
    """
    if model in SHAPES:
        raise InvalidOption(name="--text", got=str(text), expected="a checkpoint beside it: a shape has random weights")
    if tokens < 2:
        raise InvalidOption(name="--text-tokens", got=tokens, expected="at least two tokens")
    from transformers import AutoTokenizer

    windows = token_batches(load_texts(text), AutoTokenizer.from_pretrained(model), tokens=tokens, context=WINDOW, batch_size=1)
    found = sum(int(window["attention_mask"].sum()) for window in windows)
    if found < tokens:
        raise InvalidOption(name="--text-tokens", got=tokens, expected=f"at most the {found} tokens of the text")
    # the last window has no padding either
    return Text([{"input_ids": window["input_ids"][:, : int(window["attention_mask"].sum())]} for window in windows])
