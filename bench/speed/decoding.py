"""Step-by-step decoding with a static cache after contexts of random lengths, with the time of each token.

In: a model and a batch size. Out: logits of fixed steps (for the comparison with the reference), times of steps in ms, the time
of a prefill. All variants of the model share one cache, since a captured CUDA graph is valid for fixed addresses. The eager dense
model always processes the context, untimed: only decoding is timed.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.common.models import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Any]
_COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}


@dataclass(frozen=True, eq=False)
class Script:
    """A context and the tokens fed one by one after it, (batch, tokens) each."""

    context_BT: Tensor
    tokens_BT: Tensor


class Decoder:
    """``batch`` sequences at once in a cache of ``room`` tokens."""

    def __init__(self, model: PreTrainedModel, *, batch: int, room: int, seed: int = 0) -> None:
        from transformers import StaticCache

        self.model, self.batch, self.room = model, batch, room
        self.device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self._generator = torch.Generator().manual_seed(seed)

    def tokens(self, length: int) -> Tensor:
        """Random tokens, (batch, length)."""
        drawn = torch.randint(vocabulary_of(self.model), (self.batch, length), generator=self._generator)
        return drawn.to(self.device)

    def script(self, context: int, steps: int) -> Script:
        """A script of random tokens."""
        return Script(self.tokens(context), self.tokens(steps))

    def read(self, tokens_BT: Tensor, forward: Forward | None = None) -> Tensor:
        """Prefill the emptied cache with a context. Returns the next token of each sequence, (batch, 1)."""
        self.cache.reset()
        return self._next(self._call(forward or self.model.forward, tokens_BT, 0))

    def logits(self, forward: Forward, script: Script) -> Tensor:
        """Logits of single steps over the script's tokens after its context, (steps, batch, vocabulary), fp32."""
        self.read(script.context_BT)
        length = script.context_BT.shape[1]
        # the strides of a token from argmax: other strides would cause a recompilation
        columns = [column.clone(memory_format=torch.contiguous_format) for column in script.tokens_BT.split(1, dim=1)]
        return torch.stack([self._call(forward, column, length + i) for i, column in enumerate(columns)])

    def decode(self, forward: Forward, length: int, count: int) -> tuple[list[float], float]:
        """(ms of each step, seconds of all) of ``count`` greedy steps after a random context of ``length`` tokens."""
        return self.steps(forward, self.read(self.tokens(length)), length, count)

    def steps(self, forward: Forward, token_B1: Tensor, length: int, count: int) -> tuple[list[float], float]:
        """The same after the context that the cache holds. On a GPU the host does not synchronise between steps."""
        position = torch.full((self.batch, 1), length, device=self.device)
        self.synchronize()
        began = time.perf_counter()
        marks: list[Any] = [self._mark()]
        for _ in range(count):
            output = forward(
                input_ids=token_B1, past_key_values=self.cache, position_ids=position, use_cache=True, logits_to_keep=1
            )
            token_B1 = self._next(output.logits)
            position = position + 1
            marks.append(self._mark())
        self.synchronize()
        seconds = time.perf_counter() - began
        if self.device.type == "cuda":
            return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)], seconds
        return [1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)], seconds

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _call(self, forward: Forward, tokens_BT: Tensor, position: int) -> Tensor:
        """Logits of the last token, (batch, vocabulary), fp32; a copy, since the next graph replay overwrites the output."""
        positions = torch.arange(position, position + tokens_BT.shape[1], device=self.device).expand(self.batch, -1).contiguous()
        output = forward(
            input_ids=tokens_BT, past_key_values=self.cache, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1].to(torch.float32, copy=True)  # type: ignore[no-any-return]

    @staticmethod
    def _next(logits: Tensor) -> Tensor:
        last = logits.reshape(logits.shape[0], -1, logits.shape[-1])[:, -1:]
        if last.device.type == "cpu":  # as for llama.cpp, and much faster than torch's in bf16
            return torch.from_numpy(last.float().numpy().argmax(-1))
        return last.argmax(-1)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def contexts(count: int, longest: int, seed: int) -> list[int]:
    """Random lengths of contexts, uniform in 1..longest."""
    return torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def percentiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return dict(zip(("p20", "p50", "p80"), found, strict=True))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of a large buffer; median of ten."""
    source = torch.ones(_COPY_BYTES.get(device.type, 2**28) // 4, device=device)
    target = torch.empty_like(source)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(12):
        wait()
        began = time.perf_counter()
        target.copy_(source)
        wait()
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / percentiles(seconds[2:])["p50"]


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes since ``reset_peak`` (on a CPU: since the start of the process)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of peak memory; no effect on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
