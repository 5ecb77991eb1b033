"""masked_gemv.cu on a CPU: the kernel's own source, with emulated_gpu.h in place of the instructions of a GPU. And operands."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from rana_fx.formats import pack
from rana_fx.kernels.cuda import masked_gemv as kernel
from rana_fx.kernels.cuda import masked_gemv_parts as parts
from rana_fx.kernels.cuda.config import Config
from tests.support.products import Product

_HEADER = Path(__file__).with_name("emulated_gpu.h")
_MAIN = """
extern "C" void launch(const Parts* parts, int blocks, void* to, const void* from, size_t size) {
  late = {to, from, size};
  run_on_cluster(blocks, SPLITS, THREADS, SHARED_BYTES, [parts] { masked_gemv(*parts); });
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


def masked_gemv(v, *operands, residual=None, activation=None, config=None, early=False):
    """As the launcher of that name: tau, weight, bias and scale."""
    given = [*operands, *[None] * (4 - len(operands))]
    facts = dict(residual=residual, activation=activation, config=config or Config())
    return _launched(v, early, lambda v: kernel.prepared(v, *given, **facts))


def masked_gemv_parts(v, taus, weights, biases=(), *, config=None, early=False):
    """As the launcher of that name."""
    return _launched(v, early, lambda v: parts.prepared(v, taus, weights, biases, config=config or Config()))


def _launched(v, early, prepare):
    """The result of a launch. ``early``: v is NaN until the launch waits for the previous kernel."""
    written = v.clone()
    v = torch.full_like(v, float("nan")) if early else v
    launch = prepare(v)
    launch.y.fill_(float("nan"))
    late = (v.data_ptr(), written.data_ptr(), written.nbytes) if early else (written.data_ptr(), v.data_ptr(), 0)
    _compiled(launch.constants, early).launch(
        ctypes.byref(launch.arguments), launch.blocks, *map(ctypes.c_void_p, late[:2]), ctypes.c_size_t(late[2])
    )
    return launch.y.reshape(*v.shape[:-1], -1)


def product(tokens, ranks, columns, bits, *, dtype=torch.bfloat16, group=64, scale_dtype=torch.bfloat16, threshold=0.3, seed=0,
            outliers=0, positive=False, bias=True):  # fmt: skip
    """A product with Gaussian operands; ``outliers`` values of each token are 1000 times as large."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(tokens, ranks, generator=generator)
    v[:, :outliers] *= 1000
    v = v.abs() if positive else v
    weight, scale = torch.randn(ranks, columns, generator=generator), None
    weight, scale = (weight.to(dtype), None) if bits == 16 else pack(weight, bits, group, scale_dtype)
    tau = torch.rand(ranks, generator=generator) * threshold
    added = torch.randn(columns, generator=generator) if bias else None
    return Product(v.to(dtype), tau, weight, scale, added)
