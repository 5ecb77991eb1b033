"""The folder of a plan as an option of torch.compile: read once while it is unchanged, read again after a change.

In: the path given by the user. Out: the plan currently in it. torch.compile reuses code that was compiled with equal options, so
that a path alone would run the old plan after another one was saved there. The options that a graph was compiled with therefore
hold a ``Folder``, which equals a path as long as the header file there has the content that was compiled. Nothing is checked when
compiled code runs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from rana_fx.atomic import read_regular
from rana_fx.graph.callers import variable_of_caller
from rana_fx.plan import Plan, load_plan
from rana_fx.plan_io import HEADER

# by path and digest of the header: the header has the plan's digest, and the name of the tensors' file, which is their digest
_loaded: WeakValueDictionary[tuple[str, str], Plan] = WeakValueDictionary()


class Folder:
    """The folder of a saved plan, and the digest of its header when the plan was loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = os.path.realpath(path)
        self._header, self._stat = "", (0, 0, 0, 0)

    def load(self) -> Plan:
        """The plan currently in the folder. Raises PlanFileError, PlanVersion."""
        while True:
            before = self._content()
            plan = _loaded.get((self._at, before)) or load_plan(self.path)
            if self._content() == before:  # else: saved again during the load
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
            return hashlib.sha256(read_regular(self.path / HEADER)).hexdigest()
        except OSError:
            return ""

    def _status(self) -> tuple[int, int, int, int]:
        """(inode, size, mtime, ctime) of the header: differs after a change, also where the modification time was set back."""
        try:
            found = (self.path / HEADER).stat()
        except OSError:
            return (0, 0, 0, 0)
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def compiled_with(options: Mapping[str, Any], folder: Folder) -> None:
    """Put ``folder`` into the options that torch.compile compares for this compilation; the user's mapping is not changed."""
    wrapper: Any = variable_of_caller("__call__", "self", torch._TorchCompileWrapper)
    if wrapper is not None and wrapper.kwargs.get("options") is options:
        wrapper.kwargs["options"] = dict(options) | {"plan": folder}


def kept_alive(compiled: Any, *things: object) -> Any:
    """``compiled``, with references to ``things`` for its lifetime."""
    try:
        compiled._rana_fx_holds = things
    except AttributeError:  # such as a bound method
        return kept_alive(lambda *args: compiled(*args), *things)
    return compiled
