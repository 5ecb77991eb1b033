"""Times of greedy decoding, one sequence in a static cache, of two compilations of one model in turn.

In: a causal language model of transformers, a prompt as token ids, and functions called like its ``forward``. Out: for each of
them the times of single tokens, of the first token, and of compilation. They share one cache, since a captured CUDA graph is
valid for fixed addresses, and take turns, so that a change of the machine's load concerns both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rana_fx.calibration.batches import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Any]
ROUNDS = 3
_WARM = 3  # calls for each shape: compile, capture, replay
_BLOCK = 64  # tokens that the length of the cache is a multiple of


@dataclass(frozen=True)
class Times:
    """``rounds_ms``: times of the tokens after the first, by round. ``first_ms``: of the prompt and the first token, by round."""

    rounds_ms: tuple[tuple[float, ...], ...]
    first_ms: tuple[float, ...]
    compile_s: float

    @property
    def medians_ms(self) -> tuple[float, ...]:
        """Median time of a token, by round."""
        return tuple(map(statistics.median, self.rounds_ms))


def decoding_times(
    model: PreTrainedModel,
    prompt_1T: Tensor,
    forwards: Mapping[str, Forward],
    *,
    new_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """By name. ``new_tokens``: timed in each of ``ROUNDS`` rounds. ``advance``: called after the warm-up and after each round."""
    decoder = _Decoder(model, prompt_1T.to(model.device), new_tokens)
    compile_s: dict[str, float] = {}
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in forwards}
    with torch.no_grad(), evaluating(model):
        for name, forward in forwards.items():
            began = time.perf_counter()
            decoder.round(forward, 1)
            first = time.perf_counter() - began
            for _ in range(_WARM - 1):
                began = time.perf_counter()
                decoder.round(forward, 1)
            compile_s[name] = max(0.0, first - (time.perf_counter() - began))
            advance()
        for _ in range(ROUNDS):
            for name, forward in forwards.items():
                found[name].append(decoder.round(forward, new_tokens))
                advance()
    return {
        name: Times(tuple(tuple(steps) for _, steps in rounds), tuple(first for first, _ in rounds), compile_s[name])
        for name, rounds in found.items()
    }


class _Decoder:
    def __init__(self, model: PreTrainedModel, prompt_1T: Tensor, new_tokens: int) -> None:
        from transformers import StaticCache

        room = -(-(prompt_1T.shape[1] + new_tokens) // _BLOCK) * _BLOCK
        self._prompt, self._device = prompt_1T, model.device
        self._cache = StaticCache(config=model.config, max_cache_len=room)
        self._positions = torch.arange(room, device=model.device)[None]

    def round(self, forward: Forward, count: int) -> tuple[float, list[float]]:
        """(ms of the prompt and the first token, ms of each of ``count`` tokens after it)."""
        length = self._prompt.shape[1]
        self._cache.reset()
        self._synchronize()
        began = time.perf_counter()
        token_11 = self._next(forward, self._prompt, self._positions[:, :length].contiguous())
        self._synchronize()
        first = 1000 * (time.perf_counter() - began)
        times = []
        for index in range(length, length + count):
            position = self._positions[:, index : index + 1].clone()
            self._synchronize()
            began = time.perf_counter()
            token_11 = self._next(forward, token_11, position)
            self._synchronize()
            times.append(1000 * (time.perf_counter() - began))
        return first, times

    def _next(self, forward: Forward, tokens_1T: Tensor, positions_1T: Tensor) -> Tensor:
        """The most probable next token, (1, 1)."""
        output = forward(
            input_ids=tokens_1T, past_key_values=self._cache, position_ids=positions_1T, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
