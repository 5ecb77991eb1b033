"""Training methods by name, for the command line and the benches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from rana_fx.choices import METHODS as METHODS
from rana_fx.errors import UnknownChoice
from rana_fx.training.lora import add_lora
from rana_fx.training.parameters import trainable

if TYPE_CHECKING:
    from peft import LoraConfig


def choose(model: nn.Module, method: str, *, config: LoraConfig | None = None, seed: int = 0) -> dict[str, nn.Parameter]:
    """Select the Parameters that a method trains: low-rank additions, everything, or the plan's matrices; returns them by name.

    Args:
        config, seed: of ``add_lora``, for "lora".

    Raises:
        UnknownChoice, and what ``add_lora`` and ``trainable`` raise.
    """
    if method not in METHODS:
        raise UnknownChoice(kind="method", got=method, valid=", ".join(METHODS))
    if method == "lora":
        return add_lora(model, config, seed=seed)
    return trainable(model, what="all" if method == "full" else "factors")
