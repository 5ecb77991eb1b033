"""CUDA C++ to machine code by NVRTC, the compiler library that PyTorch's CUDA wheels depend on.

In: a source text and constants. Out: a cubin, kept in a file of Inductor's cache folder under a hash of all that it depends on,
so that a second process compiles nothing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from rana_fx.atomic import replacing
from rana_fx.errors import KernelNotCompiled

OPTIONS = ("-std=c++17", "-default-device")


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the CUDA version that PyTorch was built for, or None where there is none."""
    if torch.version.cuda is None:
        return None
    name = f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}"
    for path in (name, *(str(folder / name) for folder in _folders())):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def _folders() -> list[Path]:
    """Where NVIDIA's wheels and a toolkit put the library."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = [library.parent for folder in wheels for library in folder.glob("*/lib/libnvrtc.so.*")]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return [*found, Path(torch.__file__).parent / "lib", Path(home) / "lib64"]


def compiled(source: str, constants: Mapping[str, int], architecture: str, *, name: str = "masked_gemv.cu") -> bytes:
    """The machine code of a source with preprocessor constants.

    Args:
        architecture: such as "sm_90a".
        name: of the source, for messages.

    Raises:
        KernelNotCompiled: with NVRTC's own message.
    """
    nvrtc = library()
    if nvrtc is None:
        raise KernelNotCompiled(kernel=name, reason=f"NVRTC of CUDA {torch.version.cuda} was not found")
    text = "".join(f"#define {name} {value}\n" for name, value in constants.items()) + source
    options = (f"--gpu-architecture={architecture}", *OPTIONS)
    key = hashlib.sha256(repr((text, options, _version(nvrtc))).encode()).hexdigest()
    file = _folder() / f"{key}.cubin"
    if file.exists():
        return file.read_bytes()
    code = _compile(nvrtc, text, options, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as made:
        made.write(code)
    return code


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "rana_fx_cuda"


def _version(nvrtc: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _compile(nvrtc: ctypes.CDLL, text: str, options: tuple[str, ...], name: str) -> bytes:
    program = ctypes.c_void_p()
    failed = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = failed or nvrtc.nvrtcCompileProgram(program, len(options), given)
    if failed:
        raise KernelNotCompiled(kernel=name, reason=_text(nvrtc, "ProgramLog", program).decode(errors="replace"))
    code = _text(nvrtc, "CUBIN", program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code


def _text(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    memory = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, memory)
    return memory.raw
