"""The variant ``llama.cpp:TYPE`` of ``bench.decode``: the run's model in a GGUF file, decoded by llama.cpp like other variants.

In: the run's model. Out: files of each type, made once in a temporary folder; an ``EngineDecoder``, which decodes with the calls
of ``Decoder``, one sequence at a time: random contexts, greedy steps, the time of each.

Rounded weights have no reference that their logits must equal. What is verified instead is the file that all types are made from:
its matrices have the model's dtype, and its logits must be those of the eager model. The bound is that of other variants for an
fp16 KV cache, or what the model makes of rounding its norms to fp16, which trained weights may amplify.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.common.models import layers_of
from bench.speed import gguf_source, llama_engine
from bench.speed.decoding import Decoder, Forward, Script
from bench.speed.verify import bound, of_noise, perturbed, relative_rmse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILY = "llama.cpp"
_CONTEXT, _STEPS = 16, 4


@dataclass(eq=False)
class Files:
    """GGUF files of the run's model by type. ``given``: the checkpoint's own file; without one, the model is written."""

    model: PreTrainedModel
    folder: Path
    given: Path | None = None
    conversion: dict[str, float] | None = None

    def make(self, name: str, decoder: Decoder) -> Path:
        """The file of that type.

        Raises:
            RuntimeError: llama.cpp cannot make it, or the source's logits are not the model's.
        """
        made = self.folder / f"{name}.gguf"
        if not made.exists():
            source = self._source(decoder)
            try:
                llama_engine.make_type(source, name, made, threads=torch.get_num_threads())
            except BaseException:
                with suppress(FileNotFoundError):
                    made.unlink()
                raise
        return made

    def _source(self, decoder: Decoder) -> Path:
        """The unrounded file, verified once."""
        path = self.given or self.folder / "source.gguf"
        if self.given is None and not path.exists():
            gguf_source.write_gguf(self.model, path)
        if self.conversion is None:
            self.conversion = self._compare(path, decoder)
        if self.conversion["error"] > self.conversion["bound"]:
            raise RuntimeError(
                f"wrong conversion: logits of {path.name} differ from the model's by {self.conversion['error']:.2g}, "
                f"more than {self.conversion['bound']:.2g}"
            )
        return path

    def _compare(self, path: Path, decoder: Decoder) -> dict[str, float]:
        """Relative RMSE between the logits of the file and of the model, and its bound."""
        model, script = self.model, decoder.script(_CONTEXT, _STEPS)
        coarser = max(torch.float16, model.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        expected = decoder.logits(model.forward, script)
        with perturbed(model, torch.finfo(coarser).eps, seed=0, by_size=True):
            noise = relative_rmse(decoder.logits(model.forward, script), expected)
        with opened(path, decoder, room=decoder.room) as engine:
            error = relative_rmse(engine.logits(None, script), expected)
        terms = max(parameter.shape[1] for parameter in model.parameters() if parameter.dim() == 2)
        return {"error": error, "bound": of_noise(bound(coarser, layers_of(model), terms), noise)}


@contextmanager
def gguf_files(model: PreTrainedModel, *, given: Path | None) -> Iterator[Files]:
    """Inside, files are in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="rana-fx-gguf-") as folder:
        yield Files(model, Path(folder), given)


@contextmanager
def opened(path: Path, decoder: Decoder, *, room: int) -> Iterator[EngineDecoder]:
    """Inside, the file is in memory, with as many threads as torch has."""
    engine = llama_engine.Engine(path, room=room, threads=torch.get_num_threads())
    try:
        yield EngineDecoder(engine, decoder)
    finally:
        engine.close()


class EngineDecoder:
    """Decodes as ``Decoder`` does, by an engine; contexts are drawn by a ``Decoder``. The argument ``forward`` is not used."""

    batch = 1

    def __init__(self, engine: llama_engine.Engine, decoder: Decoder) -> None:
        self.engine, self.room, self.device = engine, engine.room, decoder.device
        self.tokens: Callable[[int], Tensor] = decoder.tokens

    def read(self, tokens_BT: Tensor, forward: Forward | None = None) -> int:
        """Read a context into the emptied cache. Returns the next token."""
        self.engine.clear()
        return int(self.engine.feed(tokens_BT[0].tolist())[0].argmax())

    def logits(self, forward: Forward | None, script: Script) -> Tensor:
        """Logits of single steps over the script's tokens after its context, (steps, 1, vocabulary)."""
        self.read(script.context_BT)
        return torch.stack([torch.tensor(self.engine.feed([token])) for token in script.tokens_BT[0].tolist()])

    def decode(self, forward: Forward | None, length: int, count: int) -> tuple[list[float], float]:
        """(ms of each step, seconds of all) of ``count`` greedy steps after a random context of ``length`` tokens."""
        token = self.read(self.tokens(length))
        marks = [time.perf_counter()]
        for _ in range(count):
            # by NumPy: threads of torch that have just worked spin for a while, on the cores of llama.cpp's
            token = int(self.engine.feed([token])[0].argmax())
            marks.append(time.perf_counter())
        return [1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)], marks[-1] - marks[0]

    def all_logits(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Called like a model: logits of all positions of one sequence, (1, tokens, vocabulary)."""
        self.engine.clear()
        return torch.tensor(self.engine.feed(input_ids[0].tolist(), every=True)).unsqueeze(0)

    def synchronize(self) -> None:
        """Every call has ended when it returns."""
