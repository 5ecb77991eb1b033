"""Results that problems of several budgets share, in bounded memory.

In: keys and functions. Out: their results, each computed once as long as there is room to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

MOST_BYTES = 4e9  # of what is kept: a larger model has the rest computed anew

_T = TypeVar("_T")


class Memory:
    """Results by key, as long as there is room for them."""

    def __init__(self, most_bytes: float = MOST_BYTES) -> None:
        self._room = most_bytes
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """``make()``, or what it returned the last time for this key."""
        if key in self._found:
            found: _T = self._found[key]
            return found
        made = make()
        needed = _bytes(made)
        if needed <= self._room:
            self._room -= needed
            self._found[key] = made
        return made


def _bytes(value: object) -> int:
    """Of all tensors in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return sum(map(_bytes, vars(value).values())) if hasattr(value, "__dict__") else 0
