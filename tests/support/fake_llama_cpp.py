"""A module in place of llama-cpp-python: its functions that ``bench.speed.llama_engine`` calls, on a model of transformers.

Files hold the number of their type; logits of Q4_0 are halved, so that they differ from others. It has no cache: every call
runs the model on all tokens so far, whose positions it checks.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from bench.speed.llama_engine import TYPES


class _Params(ctypes.Structure):
    _fields_ = [("ftype", ctypes.c_int), ("nthread", ctypes.c_int)]


class FakeLlamaCpp(ModuleType):
    """``calls``: what was called, with its arguments. ``refuse``: a type that cannot be written."""

    __version__ = "0.0"

    def __init__(self, model):
        super().__init__("llama_cpp")
        self.model, self.calls, self.refuse, self.open = model, [], None, 0
        for number, name in enumerate(TYPES.values()):
            setattr(self, f"LLAMA_FTYPE_{name}", number)
        self.llama_log_callback = lambda function: function
        self.llama_model_quantize_default_params = _Params
        self.llama_model_default_params = self.llama_context_default_params = SimpleNamespace
        self.llama_model_get_vocab = self.llama_get_memory = lambda given: given

    def llama_log_set(self, callback, _):
        self.log = callback

    def llama_model_quantize(self, source, out, params):
        number = params._obj.ftype
        self.calls.append(("quantize", number, params._obj.nthread))
        if number == self.refuse:
            self.log(2, b"a warning\n", None)
            self.log(3, b"no such type here\n", None)
            Path(os.fsdecode(out)).write_text("half a file")
            return 1
        assert Path(os.fsdecode(source)).exists()
        Path(os.fsdecode(out)).write_text(json.dumps(number))
        return 0

    def llama_model_load_from_file(self, path, params):
        assert params.n_gpu_layers == 0
        self.open += 1
        return SimpleNamespace(type=json.loads(Path(os.fsdecode(path)).read_text()))

    def llama_init_from_model(self, model, params):
        self.calls.append(("context", params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch))
        self.open += 1
        return SimpleNamespace(type=model.type, tokens=[], room=params.n_ctx)

    def llama_vocab_n_tokens(self, _):
        return self.model.config.vocab_size

    def llama_batch_init(self, room, embd, sequences):
        assert (embd, sequences) == (0, 1)
        self.open += 1
        lists = {name: [0] * room for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[7] for _ in range(room)], **lists)

    def llama_memory_clear(self, context, data):
        assert data
        context.tokens.clear()

    def llama_decode(self, context, batch):
        n, used = batch.n_tokens, len(context.tokens)
        assert batch.pos[:n] == list(range(used, used + n)) and used + n <= context.room
        assert batch.n_seq_id[:n] == [1] * n and batch.seq_id[:n] == [[0]] * n
        context.tokens += batch.token[:n]
        logits = self.model(input_ids=torch.tensor([context.tokens])).logits[0, used:]
        wanted = logits[torch.tensor([bool(flag) for flag in batch.logits[:n]])].float()
        half = context.type == self.LLAMA_FTYPE_MOSTLY_Q4_0
        context.logits = (wanted * 0.5 if half else wanted).contiguous().numpy()
        return 0

    def llama_get_logits(self, context):
        return context.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def _freed(self, _):
        self.open -= 1

    llama_batch_free = llama_free = llama_model_free = _freed
