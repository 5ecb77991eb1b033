"""masked_gemv.cu on a CPU: the kernel's own source, with emulated_gpu.h in place of the instructions of a GPU."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from rana_fx.kernels.cuda import masked_gemv as kernel
from rana_fx.kernels.cuda.config import Config

_HEADER = Path(__file__).with_name("emulated_gpu.h")
_MAIN = """
extern "C" void launch(const Arguments* a, int blocks, void* to, const void* from, size_t size) {
  late = {to, from, size};
  run_on_cluster(blocks, SPLITS, THREADS, SHARED_BYTES, [a] { masked_gemv(*a); });
}
"""


@functools.cache
def _compiled(constants, early):
    """A shared library with one function, ``launch``."""
    primitives = (Path(kernel.__file__).parent / "primitives.cuh").read_text()
    assert kernel.source().startswith(primitives)
    defined = "".join(f"#define {name} {value}\n" for name, value in (*constants, ("EARLY", int(early))))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(defined + _HEADER.read_text() + kernel.source().removeprefix(primitives) + _MAIN)
        # lanes of a warp run one after another: what they share is not to be kept in registers over a wait
        subprocess.run(["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


def masked_gemv(v, tau, weight, bias=None, scale=None, *, residual=None, activation=None, config=None, early=False):
    """As the launcher of that name. ``early``: v is NaN until the launch waits for the previous kernel."""
    written = v.clone()
    v = torch.full_like(v, float("nan")) if early else v
    launch = kernel.prepared(v, tau, weight, bias, scale, residual=residual, activation=activation, config=config or Config())
    launch.y.fill_(float("nan"))
    late = (v.data_ptr(), written.data_ptr(), written.nbytes) if early else (written.data_ptr(), v.data_ptr(), 0)
    _compiled(launch.constants, early).launch(
        ctypes.byref(launch.arguments), launch.blocks, *map(ctypes.c_void_p, late[:2]), ctypes.c_size_t(late[2])
    )
    return launch.y.reshape(*v.shape[:-1], -1)
