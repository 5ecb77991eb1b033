"""Kernels of one graph in one shared library: the C++ compiler starts and reads its headers, three quarters of its time for a
small kernel, once for a graph instead of once for each kernel. Options, headers and the text of each kernel are Inductor's."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache

_INCLUDE = re.compile(r"^#include .*$", re.MULTILINE)
_ENTRY = re.compile(r"\bvoid\s+kernel\(")


class _Library(CppPythonBindingsCodeCache):
    """The same compiler options and precompiled header, loaded through ctypes."""

    cache: dict[str, Any] = {}

    @staticmethod
    def _load_library_inner(path: str, key: str) -> ctypes.CDLL:
        return ctypes.CDLL(path)


class _Batch:
    """Sources until the first call of one of their kernels, which compiles all of them."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.library: ctypes.CDLL | None = None

    def add(self, source: str) -> int:
        if source not in self.sources:
            self.sources.append(source)
        return self.sources.index(source)

    def compiled(self) -> ctypes.CDLL:
        if self.library is None:
            includes = dict.fromkeys(line for source in self.sources for line in _INCLUDE.findall(source))
            parts = [*includes]
            for index, source in enumerate(self.sources):
                body, count = _ENTRY.subn(f"void kernel_{index}(", _INCLUDE.sub("", source))
                assert count == 1, source
                # helpers of different kernels may have one name
                parts.append(f"namespace part_{index} {{\n{body}\n}}")
            self.library = _Library.load("\n".join(parts) + "\n")
        return self.library


class _Kernel:
    """One kernel of a batch, called with tensors and integers."""

    def __init__(self, batch: _Batch, argtypes: list[str], source: str) -> None:
        self.batch, self.index, self.function = batch, batch.add(source), None
        self.types = [ctypes.c_void_p if "*" in name else {"int64_t": ctypes.c_int64}[name.split()[-1]] for name in argtypes]

    def __call__(self, *args: torch.Tensor | int) -> None:
        if self.function is None:
            self.function = getattr(self.batch.compiled(), f"kernel_{self.index}")
            self.function.argtypes, self.function.restype = self.types, None
        self.function(*(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in args))


@contextlib.contextmanager
def one_library() -> Iterator[None]:
    """Kernels of graphs that are compiled and first called inside become one library for each graph."""

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> _Kernel:
        batch = vars(self).setdefault("_batch_of_tests", _Batch())  # each generated module has an AsyncCompile of its own
        return _Kernel(batch, argtypes, source_code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncCompile, "cpp_pybinding", cpp_pybinding)
        yield
