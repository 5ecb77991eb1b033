"""The folder of a plan as an option of torch.compile: read once while it stays as it is, and noticed when it changes.

In: the path that a user gave. Out: the plan in it now. torch.compile takes code that was compiled with equal options, so a path
alone would run the old plan after another one was saved there. The options that a graph was compiled with therefore hold a
``Folder``, which is equal to a path as long as the header there has the content that was compiled. Code that runs is not asked.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary

import torch

from rana_fx.plan import Plan, load_plan
from rana_fx.plan_io import HEADER

# by path and header: the header has the plan's digest, and the name of the tensors' file, which is their digest
_loaded: WeakValueDictionary[tuple[str, str], Plan] = WeakValueDictionary()


class Folder:
    """The folder of a saved plan, and what was in it when it was loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = os.path.realpath(path)
        self._header, self._stat = "", (0, 0, 0, 0)

    def load(self) -> Plan:
        """The plan in it now. Raises PlanFileError, PlanVersion."""
        while True:
            before = self._content()
            plan = _loaded.get((self._at, before)) or load_plan(self.path)
            if self._content() == before:  # else: saved anew meanwhile
                break
        self._header, self._stat = before, self._status()
        return _loaded.setdefault((self._at, before), plan)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Folder):
            return (self._at, self._header) == (other._at, other._header)
        if not isinstance(other, (str, Path)) or os.path.realpath(other) != self._at:
            return False
        status = self._status()
        if status == self._stat:
            return True
        if self._content() != self._header:
            return False
        self._stat = status
        return True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(str(self.path))

    def _content(self) -> str:
        try:
            return hashlib.sha256((self.path / HEADER).read_bytes()).hexdigest()
        except OSError:
            return ""

    def _status(self) -> tuple[int, int, int, int]:
        """Changes with the file, whatever its modification time is set to."""
        try:
            found = (self.path / HEADER).stat()
        except OSError:
            return (0, 0, 0, 0)
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def compiled_with(options: Mapping[str, Any] | None, folder: Folder) -> None:
    """Put ``folder`` into the options that torch.compile compares, of the compilation in progress; a user's mapping stays."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        wrapper: Any = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if isinstance(wrapper, torch._TorchCompileWrapper):
            if options and wrapper.kwargs.get("options") is options:
                wrapper.kwargs["options"] = dict(options or {}) | {"plan": folder}
            return
        frame = frame.f_back


def kept_alive(compiled: Any, *things: object) -> Any:
    """``compiled``, which holds ``things`` as long as it lives."""
    try:
        compiled._rana_fx_holds = things
    except AttributeError:  # a bound method, say
        return kept_alive(lambda *args: compiled(*args), *things)
    return compiled
