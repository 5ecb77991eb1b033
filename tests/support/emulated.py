"""masked_gemv.cu on a CPU: the kernel's own source, with emulated_gpu.h in place of the instructions of a GPU."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from rana_fx.kernels.cuda import masked_gemv as kernel
from rana_fx.kernels.cuda.config import Config

_HEADER = Path(__file__).with_name("emulated_gpu.h")
_MAIN = """
extern "C" void launch(const Arguments* a, int blocks) {
  run_on_cluster(blocks, SPLITS, THREADS, SHARED_BYTES, [a] { masked_gemv(*a); });
}
"""


@functools.cache
def _compiled(constants):
    """A shared library with one function, ``launch``."""
    primitives = (Path(kernel.__file__).parent / "primitives.cuh").read_text()
    assert kernel.source().startswith(primitives)
    defined = "".join(f"#define {name} {value}\n" for name, value in (*constants, ("EARLY", 0)))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(defined + _HEADER.read_text() + kernel.source().removeprefix(primitives) + _MAIN)
        # lanes of a warp run one after another: what they share is not to be kept in registers over a wait
        subprocess.run(["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


def masked_gemv(v, tau, weight, bias=None, scale=None, *, residual=None, activation=None, config=None):
    """As the launcher of that name."""
    launch = kernel.prepared(v, tau, weight, bias, scale, residual=residual, activation=activation, config=config or Config())
    launch.y.fill_(float("nan"))
    _compiled(launch.constants).launch(ctypes.byref(launch.arguments), launch.blocks)
    return launch.y.reshape(*v.shape[:-1], -1)
