"""Choose a learning rate by trying several on a part of the text.

In: what ``train`` takes, and rates. Out: the rate with the lowest loss on the held-out text, after a complete schedule
over a fraction of the batches, each from the same initial Parameters; the Parameters are restored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rana_fx.errors import InvalidOption, LossNotFinite, NonFinite
from rana_fx.modules import unwrap
from rana_fx.training.loop import train
from rana_fx.training.settings import Settings

RATES = (3e-5, 1e-4, 3e-4, 1e-3)


def best_rate(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    *,
    settings: Settings,
    held_out: Sequence[dict[str, Tensor]],
    rates: Sequence[float] = RATES,
    fraction: float = 0.2,
    progress: bool = True,
) -> tuple[float, dict[float, float]]:
    """(the best rate, the held-out loss in nats per token of each rate, infinite where a loss was not finite).

    The rate is selected on the held-out text: report the quality of the result on another text.

    Args:
        model, batches, settings, held_out: as ``train`` takes them.
        rates: learning rates to try. fraction: of the steps to train for each of them, in (0, 1].

    Raises:
        InvalidOption: no rate, nothing held out, or no rate with a finite loss.
        What ``train`` raises.
    """
    if not rates or not held_out:
        raise InvalidOption(name="rates" if held_out else "held_out", got=[], expected="at least one to compare by")
    if not 0 < fraction <= 1:
        raise InvalidOption(name="fraction", got=fraction, expected="a fraction in (0, 1]")
    steps = max(1, round(len(batches) // settings.accumulate * fraction))
    part = batches[: steps * settings.accumulate]
    trained = [parameter for parameter in unwrap(model).parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    losses: dict[float, float] = {}
    for rate in rates:
        trial = replace(settings, rate=rate, evaluate_every=0, checkpoint_every=0)
        try:
            losses[rate] = train(model, part, settings=trial, held_out=held_out, progress=progress).evaluations[-1][1]
        except (LossNotFinite, NonFinite):
            losses[rate] = math.inf
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, start, strict=True):
                    parameter.copy_(value)
    best = min(losses, key=losses.__getitem__)
    if math.isinf(losses[best]):
        raise InvalidOption(name="rates", got=list(rates), expected="at least one with which the loss stays finite")
    return best, losses
