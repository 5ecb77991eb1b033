"""The loss of each variant of ``bench.decode`` on one text, beside its speed (``--text``).

In: a text file and a checkpoint's tokenizer, then the variants of a run. Out: mean loss in nats a token and perplexity, over
windows of 512 tokens without padding; every engine is fed the same token ids, and ``rana_fx.evaluation`` sums all losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench.common.models import SHAPES
from rana_fx.errors import InvalidOption
from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted
from rana_fx.evaluation.text import load_texts, token_batches

WINDOW = 512


@dataclass(eq=False)
class Text:
    """Windows of token ids, and the losses measured on them, by name."""

    windows: list[dict[str, Tensor]]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def loss(self, name: str, forward: Callable[..., Any], *, adapted: bool = False) -> dict[str, Any]:
        """Facts of a row; measured once for each name.

        Args:
            forward: a model, or what is called like one. adapted: it is a model with a plan, which runs with reference kernels.
        """
        if name not in self.found:
            if adapted:
                assert isinstance(forward, nn.Module)
                quality, _ = evaluate_adapted(forward, self.windows, progress=False)
            else:
                quality = evaluate(forward, self.windows, progress=False)
            self.found[name] = asdict(quality)
        return self.found[name]


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
