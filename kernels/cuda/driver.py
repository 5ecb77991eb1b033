"""Machine code to a kernel that is launched on PyTorch's stream, by the CUDA driver.

torch.cuda has no launch with attributes, which early launches need (programmatic dependent launch).
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from rana_fx.errors import KernelNotCompiled

# of cuda.h
_MAX_DYNAMIC_SHARED_BYTES = 8
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel of one device with its launch constants. ``early``: may start before the previous kernel of the stream is done."""

    name: str
    function: ctypes.c_void_p
    threads: int
    shared_bytes: int
    early: bool

    def __call__(self, blocks: int, arguments: ctypes.Structure) -> None:
        """Launch on the current stream of the current device. ``arguments``: the kernel's one parameter."""
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        config = _LaunchConfig(
            (blocks, 1, 1),
            (self.threads, 1, 1),
            self.shared_bytes,
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute),
            int(self.early),
        )
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None), "cuLaunchKernelEx", self.name)


def load(code: bytes, name: str, *, threads: int, shared_bytes: int, early: bool) -> Kernel:
    """The kernel ``name`` of a cubin, on the current device. Raises KernelNotCompiled."""
    torch.cuda.current_stream()  # makes PyTorch's context the current one
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData", name)
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction", name)
    given = ctypes.c_int(shared_bytes)
    _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, given), "cuFuncSetAttribute", name)
    return Kernel(name, function, threads, shared_bytes, early)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, what: str, kernel: str) -> None:
    if code:
        found = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(found))
        raise KernelNotCompiled(kernel=f"{kernel}.cu", reason=f"{what}: {(found.value or b'?').decode()}")
