"""masked_gemv.cu and router.cu on a CPU: the kernels' own source, with emulated_gpu.h in place of the instructions of a GPU. And
operands."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from rana_fx.formats import pack
from rana_fx.kernels.cuda import masked_gemv as kernel
from rana_fx.kernels.cuda import masked_gemv_parts as parts
from rana_fx.kernels.cuda import router as router_kernel
from rana_fx.kernels.cuda.config import Config
from rana_fx.kernels.cuda.router_config import RouterConfig
from tests.support.products import Product

_HEADER = Path(__file__).with_name("emulated_gpu.h")
_MAIN = """
template <class A> A parameter_of(void (*)(A));
extern "C" void launch(const void* a, int blocks, void* to, const void* from, size_t size) {
  late = {to, from, size};
  run_on_cluster(blocks, SPLITS, THREADS, SHARED_BYTES, [a] { NAME(*(const decltype(parameter_of(NAME))*)a); });
}
"""


@functools.cache
def _compiled(kernel, name, constants, early):
    """A shared library with one function, ``launch``, of the kernel of that name in a module."""
    primitives = (Path(kernel.__file__).parent / "primitives.cuh").read_text()
    assert kernel.source().startswith(primitives)
    defined = "".join(f"#define {name} {value}\n" for name, value in (*constants, ("EARLY", int(early))))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(defined + _HEADER.read_text() + kernel.source().removeprefix(primitives) + _MAIN.replace("NAME", name))
        # lanes of a warp run one after another: what they share is not to be kept in registers over a wait
        subprocess.run(["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


def masked_gemv(v, *operands, residual=None, activation=None, norm=None, config=None, early=False):
    """As the launcher of that name: tau, weight, bias, scale. ``early``: v is NaN before the launch waits for it."""
    given, later = [*operands, *[None] * (4 - len(operands))], _later(v, early)
    facts = dict(residual=residual, activation=activation, norm=norm, config=config or Config())
    launch = kernel.prepared(later.first, *given, **facts)
    _run(kernel, "masked_gemv", launch, launch.y, later)
    return launch.y.reshape(*v.shape[:-1], -1)


def masked_gemv_parts(v, taus, weights, biases=(), *, config=None, early=False):
    """As the launcher of that name. ``early``: as of ``masked_gemv``."""
    later = _later(v, early)
    launch = parts.prepared(later.first, taus, weights, biases, config=config or Config())
    _run(kernel, "masked_gemv", launch, launch.y, later)
    return launch.y.reshape(*v.shape[:-1], -1)


def router(x, weight, scale=None, *, gain=None, eps=None, offset=0.0, config=None, early=False):
    """As the launcher of that name. ``early``: x is NaN until the launch waits for the previous kernel."""
    later = _later(x, early)
    facts = dict(gain=gain, eps=eps, offset=offset, config=config or RouterConfig())
    launch = router_kernel.prepared(later.first, weight, scale, **facts)
    _run(router_kernel, "router", launch, launch.z, later)
    return launch.z.reshape(*x.shape[:-1], -1)


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


@dataclasses.dataclass(frozen=True, eq=False)
class _Later:
    """A tensor that the previous kernel writes. first: what is there before, of the same strides. then: what it writes."""

    first: torch.Tensor
    then: torch.Tensor
    early: bool


def _later(tensor, early):
    return _Later(torch.full_like(tensor, float("nan")) if early else tensor, tensor.clone(), early)


def _run(module, name, launch, result, later):
    result.fill_(float("nan"))
    late = later.first.data_ptr(), later.then.data_ptr(), later.then.nbytes if later.early else 0
    _compiled(module, name, launch.constants, later.early).launch(
        ctypes.byref(launch.arguments), launch.blocks, *map(ctypes.c_void_p, late[:2]), ctypes.c_size_t(late[2])
    )
