"""Greedy generation through torch.compile, timed token by token.

In: a causal language model, its tokenizer, a prompt and a backend. Out: the text and the time of every step. The first
steps include compilation, so the time of a token is the median over steps, and the rest is reported separately.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rana_fx.choices import CACHES as CACHES
from rana_fx.errors import InvalidOption, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generated:
    """``text``: the continuation. ``steps_ms``: time of each new token but the first; ``first_ms``: prefill and first token."""

    text: str
    tokens: int
    first_ms: float
    steps_ms: tuple[float, ...]

    @property
    def ms_per_token(self) -> float | None:
        """Median over the steps; None where there was only one token."""
        return statistics.median(self.steps_ms) if self.steps_ms else None

    @property
    def seconds(self) -> float:
        """Total time, compilation included."""
        return (self.first_ms + sum(self.steps_ms)) / 1000


def compiled_forward(model: PreTrainedModel, backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The model's forward, compiled, as ``generate`` takes it; use the result for several calls.

    The model must not change meanwhile: guards on modules are left out, which every step would evaluate.
    """
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return torch.compile(type(model).forward.__get__(model), backend=backend, options=options)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    forward: Callable[..., Any] | None = None,
    max_new_tokens: int = 64,
    cache: str = "static",
    live: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt greedily.

    Args:
        forward: from ``compiled_forward``; default: the model's own, eager.
        max_new_tokens: maximum number of tokens; fewer where the model emits an end-of-text token.
        cache: "static" (one shape for all steps) or "dynamic" (grows by one a step).
        live: called with the text of the continuation, in parts, as soon as words are whole. Its own time is not counted.

    Raises:
        InvalidOption.
    """
    if cache not in CACHES:
        raise InvalidOption(name="cache", got=cache, expected=one_of(cache, CACHES))
    if max_new_tokens < 1:
        raise InvalidOption(name="max_new_tokens", got=max_new_tokens, expected="a positive number")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidOption(name="prompt", got=prompt, expected="text in UTF-8") from error
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise InvalidOption(name="prompt", got=prompt, expected="at least one token of text")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        expected = f"at most {limit - length}: the prompt has {length} tokens and the model's context is {limit}"
        raise InvalidOption(name="max_new_tokens", got=max_new_tokens, expected=expected)
    clock = _Clock(_streamer(tokenizer, live))
    with torch.no_grad(), _forward(model, forward):
        started = time.perf_counter()
        output = _untyped(model).generate(
            **{key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")},
            do_sample=False,
            max_new_tokens=max_new_tokens,
            cache_implementation=cache if cache == "static" else "dynamic",
            # ``forward`` is compiled already, by the backend of the caller's choice
            disable_compile=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=clock,
        )
    new = output[0, length:]
    begun = [started, *clock.left]
    gaps = [1000 * (after - before) for before, after in zip(begun, clock.times, strict=False)]
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    return Generated(text=text, tokens=len(new), first_ms=gaps[0], steps_ms=tuple(gaps[1:]))


def _untyped(model: PreTrainedModel) -> Any:
    """The model as Any: mypy infers a Tensor for ``generate`` of transformers."""
    return model


class _Clock:
    """A streamer of transformers that records times. It receives tokens on the CPU, after the GPU has computed them.

    ``times``: when each new token came; ``left``: when ``shown``, a streamer that prints, was done with it.
    """

    def __init__(self, shown: Any = None) -> None:
        self.times: list[float] = []
        self.left: list[float] = []
        self._prompt = True
        self._shown = shown

    def put(self, value: Tensor) -> None:
        now = time.perf_counter()
        if self._shown is not None:
            self._shown.put(value)
        if self._prompt:
            self._prompt = False
        else:
            self.times.append(now)
            self.left.append(time.perf_counter())

    def end(self) -> None:
        """Prints what is left of a word."""
        if self._shown is not None:
            self._shown.end()


def _streamer(tokenizer: PreTrainedTokenizerBase, live: Callable[[str], None] | None) -> Any:
    """A streamer that gives ``live`` the text; None where it is."""
    if live is None:
        return None
    from transformers import TextStreamer

    give = live

    class Live(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            give(text)

    return Live(tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def _forward(model: PreTrainedModel, forward: Callable[..., Any] | None) -> Iterator[None]:
    if forward is None:
        yield
        return
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
