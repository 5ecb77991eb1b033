"""What ``adapt(..., refine=...)`` takes, checked when it is made. Importing this loads no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from rana_fx.errors import InvalidOption


@dataclass(frozen=True)
class Refine:
    """A short distillation from the dense model: how long, and how fast.

    Args:
        tokens: to train on in all. A shorter text is passed over again, in another order; that gains little.
        minutes: the training ends after so long, if the tokens are not done by then; None: no limit. What comes of a run that
            this ended depends on the speed of the machine.
        text: batches to train and judge on, as ``adapt`` takes them; None: those that ``adapt`` calibrates on.
        rate: the highest learning rate of Adam, in units of the root mean square of each matrix.

    Raises:
        InvalidOption.
    """

    tokens: int = 65_536
    minutes: float | None = None
    text: Iterable[Any] | None = None
    rate: float = 0.001

    def __post_init__(self) -> None:
        counts = isinstance(self.tokens, Integral) and not isinstance(self.tokens, bool) and self.tokens > 0
        checks = {
            "refine.tokens": (counts, self.tokens, "a positive number of tokens, such as 65536; leave refine out for none"),
            "refine.minutes": (self.minutes is None or _positive(self.minutes), self.minutes, "None or a positive number"),
            "refine.rate": (_positive(self.rate), self.rate, "a positive number, such as 0.001"),
        }
        for name, (right, got, expected) in checks.items():
            if not right:
                raise InvalidOption(name=name, got=got, expected=expected)


def _positive(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
