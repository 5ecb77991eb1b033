"""Loss and perplexity of a language model on given text, dense and adapted.

In: a model (or anything called like one) and batches of ``rana_fx.evaluation.text.token_batches``. Out: mean loss and
perplexity, and for an adapted model the measured densities and budget. Losses are computed in float32 and summed in float64, so
that differences between two runs come from the models and not from the summation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rana_fx.calibration.batches import call, evaluating, to_device
from rana_fx.choices import DTYPES as DTYPES
from rana_fx.devices import known_device as known_device
from rana_fx.errors import InvalidOption, ModelError, NoBatches, NonFinite, one_of
from rana_fx.evaluation.measure import Measurement, measuring
from rana_fx.modules import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# rows of logits converted to float32 at a time: 1024 rows of a vocabulary of 128k are half a gigabyte
_ROWS = 1024


@dataclass(frozen=True)
class Quality:
    """Mean loss in nats per predicted token, its exponential, and the number of predicted tokens."""

    mean_loss: float
    perplexity: float
    tokens: int


def evaluate(
    forward: Callable[..., Any],
    batches: Iterable[dict[str, Tensor]],
    *,
    progress: bool = True,
    watch: Callable[[Tensor, dict[str, Tensor]], None] | None = None,
) -> Quality:
    """Next-token cross-entropy over all targets that are not padding.

    Args:
        forward: a model, or a function called like one. Returns logits (B, T, V) or an object with ``.logits``.
        batches: each has ``input_ids`` (B, T) and may have ``attention_mask`` (B, T). A target counts if neither it nor the token
            it is predicted from is padding.
        watch: called with the logits of each batch and the batch, on the model's device.

    Raises:
        NoBatches: nothing to predict. NonFinite: a loss is NaN or Inf.
    """
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    targets = 0
    module = forward if isinstance(forward, nn.Module) else None
    with torch.no_grad(), nullcontext() if module is None else evaluating(module):
        for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress):
            moved = batch if module is None else to_device(batch, device_of(module))
            output = call(forward, moved)
            logits = output if isinstance(output, Tensor) else output.logits
            losses = _losses(logits, moved)
            if watch is not None:
                watch(logits, moved)
            if not torch.isfinite(losses).all():
                count = int((~torch.isfinite(losses)).sum())
                raise NonFinite(site="the model's output", count=count, what="losses", shape=tuple(losses.shape))
            total += losses.sum().cpu()
            targets += losses.numel()
    if not targets:
        raise NoBatches(hint="with two tokens in a row that are not padding")
    mean = float(total) / targets
    return Quality(mean_loss=mean, perplexity=math.exp(mean) if mean < 700 else math.inf, tokens=targets)


def evaluate_adapted(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    progress: bool = True,
    watch: Callable[[Tensor, dict[str, Tensor]], None] | None = None,
) -> tuple[Quality, Measurement]:
    """Quality of the adapted model and its measured densities and budget, from one run over the batches.

    Args:
        model: with a plan attached. It runs as the plan rewrites it, with reference kernels.
        watch: as of ``evaluate``.

    Raises:
        NoPlan, NoBatches, NonFinite.
    """
    with measuring(model) as meter:
        quality = evaluate(meter, batches, progress=progress, watch=watch)
        return quality, meter.result()


def load_model(source: str, *, dtype: str = "auto", device: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, in evaluation mode, and its tokenizer.

    Args:
        source: a local folder or a name on the hub.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on the CPU, the checkpoint's own on a GPU.
        device: such as "cpu" or "cuda:1"; default: a GPU if there is one.

    Raises:
        ModelError: with the reason. InvalidOption: unknown dtype or device.
    """
    if dtype not in DTYPES:
        raise InvalidOption(name="dtype", got=dtype, expected=one_of(dtype, DTYPES))
    target = known_device(device)
    wanted: torch.dtype | str = getattr(torch, dtype) if dtype != "auto" else torch.float32 if target.type == "cpu" else "auto"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=wanted)
            nn.Module.to(model, target)
            return model.eval(), tokenizer
    except Exception as error:  # any exception of the hub, safetensors, the tokenizer or the model's own code
        reason = " ".join(str(error).split()).rstrip(".")
        short = reason if len(reason) <= 300 else reason[:297] + "..."
        raise ModelError(source=source, reason=f"{type(error).__name__}: {short}") from error


def _losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Loss of each counted target, float64, (targets,)."""
    ids_BT = batch["input_ids"].to(logits.device)
    mask_BT = batch.get("attention_mask")
    real = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.to(logits.device) != 0
    counted = real[:, 1:] & real[:, :-1]
    target = ids_BT[:, 1:][counted]
    row, column = counted.nonzero(as_tuple=True)
    parts = [
        # indexing copies _ROWS rows, not all logits
        nn.functional.cross_entropy(
            logits[row[i : i + _ROWS], column[i : i + _ROWS]].float(), target[i : i + _ROWS], reduction="none"
        )
        for i in range(0, len(target), _ROWS)
    ]
    return torch.cat(parts).double() if parts else torch.empty(0, dtype=torch.float64, device="cpu")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Progress bars of transformers are disabled inside: loading takes seconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
