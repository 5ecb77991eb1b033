"""One GGUF file in llama.cpp on a CPU, by the low-level functions of llama-cpp-python: logits of tokens behind a KV cache.

In: a file and token ids. Out: logits. ``make_type`` rounds a file to another type of GGUF. Everything that is not given is
llama.cpp's default: the KV cache is fp16, kernels are those of its build, weights are repacked where it does so.

The package is imported when it is used: without it, ``MissingPackage``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from rana_fx.errors import MissingPackage

# types of a file by the names of llama.cpp; those are left out that need statistics of activations
TYPES = {"F32": "ALL_F32"} | {
    name: f"MOSTLY_{name}"
    for name in (
        "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "Q6_K", "Q5_K_S", "Q5_K_M", "Q4_K_S", "Q4_K_M", "Q3_K_S", "Q3_K_M",
        "Q3_K_L", "Q2_K", "IQ4_NL", "IQ4_XS",
    )
}  # fmt: skip
_ERROR = 3


def package() -> Any:
    """The module ``llama_cpp``, whose messages are kept for ``_failed`` instead of printed. Raises MissingPackage."""
    try:
        module = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise MissingPackage(what="the variant llama.cpp", package="llama-cpp-python", extra="llama") from error
    _log(module)
    return module


@functools.cache
def _log(module: Any) -> tuple[deque[str], Any]:
    """Its last error messages, and the callback that collects them, to which ctypes holds no reference."""
    last: deque[str] = deque(maxlen=3)

    @module.llama_log_callback
    def collect(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            last.append(text.decode(errors="replace").strip())

    module.llama_log_set(collect, ctypes.c_void_p(0))
    return last, collect


def _failed(what: str) -> RuntimeError:
    last, _ = _log(package())
    reason = "; ".join(last) or "no reason given"
    last.clear()
    return RuntimeError(f"llama.cpp could not {what}: {reason}")


def make_type(source: Path, name: str, out: Path, *, threads: int) -> None:
    """Write ``out``, the file ``source`` rounded to the type of that name (a key of ``TYPES``)."""
    module = package()
    params = module.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(module, f"LLAMA_FTYPE_{TYPES[name]}"), threads
    if module.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)):
        raise _failed(f"write {name}")


class Engine:
    """A file in memory with a KV cache of ``room`` tokens, for one sequence. ``close`` frees both."""

    def __init__(self, path: Path, *, room: int, threads: int) -> None:
        self._api = api = package()
        self.room, self._used = room, 0
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise _failed(f"load {path.name}")
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = room
        params.n_threads = params.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            api.llama_model_free(self._model)
            raise _failed(f"make a context of {room} tokens")
        self._batch = api.llama_batch_init(room, 0, 1)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    @property
    def version(self) -> str:
        """Of llama-cpp-python."""
        return str(self._api.__version__)

    def clear(self) -> None:
        """Empty the cache."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._used = 0

    def feed(self, tokens: list[int], *, every: bool = False) -> np.ndarray[Any, Any]:
        """Read tokens behind those in the cache. Returns fp32 logits, (1, vocabulary) after the last token or, with ``every``,
        (tokens, vocabulary); a view that is valid until the next call.
        """
        batch, last = self._batch, len(tokens) - 1
        if self._used + len(tokens) > self.room:
            raise ValueError(f"{self._used + len(tokens)} tokens do not fit a cache of {self.room}")
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._used + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i == last
        if self._api.llama_decode(self._context, batch):
            raise _failed(f"decode {len(tokens)} tokens")
        self._used += len(tokens)
        rows = len(tokens) if every else 1
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape=(rows, self._vocabulary))

    def close(self) -> None:
        """Free the memory; the engine cannot be used afterwards."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
