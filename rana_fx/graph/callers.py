"""Variables of the functions of PyTorch that are running: what a compilation does not hand to its backend."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


def variable_of_caller(function: str, name: str, kind: type[T]) -> T | None:
    """The variable ``name`` of the nearest caller called ``function`` in which it is of the type ``kind``; None without one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get(name) if frame.f_code.co_name == function else None
        if isinstance(found, kind):
            return found
        frame = frame.f_back
    return None
