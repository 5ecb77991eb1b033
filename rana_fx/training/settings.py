"""Settings of a training run: everything that determines the result besides model, plan and text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rana_fx.errors import InvalidOption

DECAYS = ("cosine", "linear")
AUTOCASTS = ("bfloat16",)  # float16 would need loss scaling


@dataclass(frozen=True)
class Settings:
    """AdamW with a warm-up and a decay to zero.

    Args:
        rate: the highest learning rate.
        decay: "cosine" or "linear", to zero at the last step.
        warmup: fraction of the steps over which the rate rises.
        weight_decay, clip: AdamW's decoupled decay; the largest norm of all gradients together, above which they are scaled.
        accumulate: batches per step.
        distill: weight w in [0, 1] of the loss (1 - w) * cross-entropy + w * KL to the dense model's predictions.
        autocast: None, or the dtype in which matmuls run while Parameters keep theirs.
        evaluate_every, checkpoint_every: in steps; 0: only at the end, and no checkpoints.
        seed: of everything random while training, such as dropout.

    Raises:
        InvalidOption.
    """

    rate: float = 1e-4
    decay: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    distill: float = 0.0
    autocast: str | None = None
    evaluate_every: int = 0
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "rate": (self.rate > 0 and math.isfinite(self.rate), "a positive number"),
            "decay": (self.decay in DECAYS, "one of " + ", ".join(DECAYS)),
            "warmup": (0 <= self.warmup < 1, "a fraction in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a number that is not negative"),
            "clip": (self.clip > 0, "a positive number"),
            "accumulate": (self.accumulate >= 1, "a positive number of batches"),
            "distill": (0 <= self.distill <= 1, "a weight in [0, 1]"),
            "autocast": (self.autocast in (None, *AUTOCASTS), "None or one of " + ", ".join(AUTOCASTS)),
            "evaluate_every": (self.evaluate_every >= 0, "a number of steps"),
            "checkpoint_every": (self.checkpoint_every >= 0, "a number of steps"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise InvalidOption(name=name, got=getattr(self, name), expected=expected)

    @property
    def cast(self) -> torch.dtype | None:
        """The dtype of ``autocast``."""
        found: torch.dtype | None = None if self.autocast is None else getattr(torch, self.autocast)
        return found

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, of ``steps``."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.rate * (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        return self.rate * (0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done)
