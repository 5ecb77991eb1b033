"""Declares ``rana::masked_gemv``, ``router``, ``masked_rows`` and fused forms: schema, fake tensor rule, autograd, who computes.

Weights are floating, int8 or packed 4-bit; scale and dtype tell which (quantize.py). The mask is a constant in the backward
pass (the paper's rule): gradients reach v where it is kept, the kept rows of a floating weight, and the bias; thresholds and
quantised weights have none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rana_fx.errors import UnknownChoice
from rana_fx.formats import gated_unit, shape_of, unpack
from rana_fx.kernels import reference
from rana_fx.kernels.triton.config import MAX_TOKENS, TOKENS_AT_ONCE

IMPLEMENTATIONS = ("auto", "reference", "triton")
_chosen = ["auto"]

_LIBRARY = torch.library.Library("rana", "DEF")
_LIBRARY.define(
    # density: the expected fraction of kept ranks; it tells who lowers the op when skipping pays, and changes no value
    "masked_gemv(Tensor v, Tensor tau, Tensor weight, Tensor? bias=None, Tensor? scale=None, float density=0.5) -> Tensor"
)
_LIBRARY.define("router(Tensor x, Tensor weight, Tensor? scale=None) -> Tensor")
# rows of x and of a are the same tokens, in the same order; the result has a's shape
_LIBRARY.define("masked_rows(Tensor x, Tensor a, Tensor weight, Tensor? bias=None, float density=0.5) -> Tensor")
# what passes/fuse_*.py make of the two in a graph that is past autograd: they have no backward
_LIBRARY.define(
    "masked_gemv_add(Tensor v, Tensor tau, Tensor weight, Tensor? bias, Tensor? scale, float density, Tensor residual) -> Tensor"
)
_LIBRARY.define(
    "masked_gemv_gated(Tensor v, Tensor tau, Tensor weight, Tensor? bias, Tensor? scale, float density, str activation) -> Tensor"
)
_LIBRARY.define("masked_gemv_parts(Tensor v, Tensor[] taus, Tensor[] weights, Tensor[] biases, float density) -> Tensor")
_LIBRARY.define(
    "normed_router(Tensor x, Tensor? gain, Tensor weight, Tensor? scale=None, float eps=0., float offset=0.) -> Tensor"
)


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Who computes the ops in eager mode, for the whole process, inside a ``with``.

    Args:
        name: "auto", kernels on a GPU for few tokens: up to 4 where the weight is floating, since above that its dense
            product is faster (cost.py), up to 16 where the reference would first have to unpack it; "reference", never;
            "triton", for up to 16 tokens of any weight, also without a GPU, where Triton must have been imported under its
            interpreter.

    Raises:
        UnknownChoice.
    """
    if name not in IMPLEMENTATIONS:
        raise UnknownChoice(kind="implementation", got=name, valid=", ".join(IMPLEMENTATIONS))
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"rana_fx.kernels.triton.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None  # Triton has no wheels for this machine


def _kernel(name: str, x: Tensor, weight: Tensor) -> ModuleType | None:
    """The launcher's module where a kernel applies."""
    if _chosen[-1] == "reference" or (_chosen[-1] == "auto" and not x.is_cuda):
        return None
    limit = TOKENS_AT_ONCE if _chosen[-1] == "auto" and weight.is_floating_point() else MAX_TOKENS
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not 1 <= math.prod(x.shape[:-1]) <= limit:
        return None
    return _module(name)


def _masked_gemv(
    v: Tensor,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    density: float = 0.5,  # noqa: ARG001
) -> Tensor:
    launcher: Any = _kernel("masked_gemv", v, weight) or reference
    y: Tensor = launcher.masked_gemv(v, tau, weight, bias, scale)
    return y


def _router(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    launcher: Any = _kernel("router", x, weight) or reference
    z: Tensor = launcher.router(x, weight, scale)
    return z


def _masked_rows(
    x: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    density: float = 0.5,  # noqa: ARG001
) -> Tensor:
    launcher: Any = _kernel("masked_rows", x, weight) or reference
    h: Tensor = launcher.masked_rows(x, a, weight, bias)
    return h


def _masked_gemv_add(
    v: Tensor,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    density: float,  # noqa: ARG001
    residual: Tensor,
) -> Tensor:
    return _finished(reference.masked_gemv_add, v, tau, weight, bias, scale, residual=residual)


def _masked_gemv_gated(
    v: Tensor,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    density: float,  # noqa: ARG001
    activation: str,
) -> Tensor:
    return _finished(reference.masked_gemv_gated, v, tau, weight, bias, scale, activation=activation)


def _finished(
    otherwise: Callable[..., Tensor], v: Tensor, tau: Tensor, weight: Tensor, *operands: Tensor | None, **more: Any
) -> Tensor:
    """The masked product with ``more`` done in its launch, by the kernel or ``otherwise``."""
    launcher: Any = _kernel("masked_gemv", v, weight)
    compute = otherwise if launcher is None else launcher.masked_gemv
    y: Tensor = compute(v, tau, weight, *operands, **more)
    return y


def _masked_gemv_parts(
    v: Tensor,
    taus: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    density: float,  # noqa: ARG001
) -> Tensor:
    launcher: Any = reference
    if all(weight.is_floating_point() and weight.stride(1) == 1 for weight in weights) and _kernel("masked_gemv", v, weights[0]):
        launcher = _module("masked_gemv_concat")
    y: Tensor = launcher.masked_gemv_parts(v, taus, weights, biases)
    return y


def _normed_router(
    x: Tensor, gain: Tensor | None, weight: Tensor, scale: Tensor | None = None, eps: float = 0.0, offset: float = 0.0
) -> Tensor:
    launcher: Any = _kernel("router", x, weight)
    if launcher is None:
        return reference.normed_router(x, gain, weight, scale, eps, offset)
    z: Tensor = launcher.router(x, weight, scale, gain=gain, eps=eps, offset=offset)
    return z


_LIBRARY.impl("masked_gemv_add", _masked_gemv_add, "CompositeExplicitAutograd")
_LIBRARY.impl("masked_gemv_gated", _masked_gemv_gated, "CompositeExplicitAutograd")
_LIBRARY.impl("masked_gemv_parts", _masked_gemv_parts, "CompositeExplicitAutograd")
_LIBRARY.impl("normed_router", _normed_router, "CompositeExplicitAutograd")
_LIBRARY.impl("masked_gemv", _masked_gemv, "CompositeExplicitAutograd")
_LIBRARY.impl("router", _router, "CompositeExplicitAutograd")
_LIBRARY.impl("masked_rows", _masked_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("rana::masked_gemv", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_masked_gemv(
    v: Tensor,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    scale: Tensor | None = None,
    density: float = 0.5,  # noqa: ARG001
) -> Tensor:
    shapes = f"v {tuple(v.shape)}, tau {tuple(tau.shape)}, weight {tuple(weight.shape)}: expected (..., K), (K,), (K, N)"
    torch._check(tau.dim() == 1 and weight.dim() == 2, lambda: shapes)
    torch._check(v.shape[-1] == weight.shape[0], lambda: shapes)
    torch._check(tau.shape[0] == weight.shape[0], lambda: shapes)
    return v.new_empty((*v.shape[:-1], shape_of(weight, scale)[1]))


@torch.library.register_fake("rana::router", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_router(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    ranks, columns = shape_of(weight, scale)
    torch._check(x.shape[-1] == columns, lambda: f"x {tuple(x.shape)}: expected (..., {columns})")
    return x.new_empty((*x.shape[:-1], ranks))


@torch.library.register_fake("rana::masked_rows", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_masked_rows(
    x: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    density: float = 0.5,  # noqa: ARG001
) -> Tensor:
    shapes = f"x {tuple(x.shape)}, a {tuple(a.shape)}, weight {tuple(weight.shape)}: expected (..., K), (..., N), (N, K)"
    torch._check(weight.dim() == 2 and x.dim() >= 1 and a.dim() >= 1, lambda: shapes)
    torch._check(x.shape[-1] == weight.shape[1], lambda: shapes)
    torch._check(a.shape[-1] == weight.shape[0], lambda: shapes)
    torch._check(math.prod(x.shape[:-1]) == math.prod(a.shape[:-1]), lambda: f"{shapes}, as many rows of x as of a")
    torch._check(x.dtype == a.dtype, lambda: f"x {x.dtype}, a {a.dtype}: expected one dtype")
    return a.new_empty(a.shape)


@torch.library.register_fake("rana::masked_gemv_add", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_masked_gemv_add(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, density: float, residual: Tensor
) -> Tensor:
    y: Tensor = _fake_masked_gemv(v, tau, weight, bias, scale, density)
    torch._check(residual.shape == y.shape, lambda: f"residual {tuple(residual.shape)}: expected {tuple(y.shape)}")
    return y


@torch.library.register_fake("rana::masked_gemv_gated", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_masked_gemv_gated(
    v: Tensor,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    density: float,
    activation: str,  # noqa: ARG001
) -> Tensor:
    y: Tensor = _fake_masked_gemv(v, tau, weight, bias, scale, density)
    columns, unit = y.shape[-1], gated_unit(weight, scale)
    torch._check(columns % unit == 0, lambda: f"{columns} columns: expected a multiple of {unit}")
    return y.new_empty((*y.shape[:-1], columns // 2))


@torch.library.register_fake("rana::masked_gemv_parts", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_masked_gemv_parts(
    v: Tensor,
    taus: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    density: float,  # noqa: ARG001
) -> Tensor:
    count = f"{len(weights)} weights with {len(taus)} thresholds and {len(biases)} biases"
    torch._check(len(taus) == len(weights) > 0 and len(biases) in (0, len(weights)), lambda: f"{count}: expected as many of each")
    widths = [_fake_masked_gemv(v, tau, weight).shape[-1] for tau, weight in zip(taus, weights, strict=True)]
    return v.new_empty((*v.shape[:-1], sum(widths)))


@torch.library.register_fake("rana::normed_router", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_normed_router(
    x: Tensor,
    gain: Tensor | None,  # noqa: ARG001
    weight: Tensor,
    scale: Tensor | None = None,
    eps: float = 0.0,  # noqa: ARG001
    offset: float = 0.0,  # noqa: ARG001
) -> Tensor:
    z: Tensor = _fake_router(x, weight, scale)
    return z


def _save_masked_gemv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    v, tau, weight, bias, scale, _ = inputs
    ctx.save_for_backward(v, tau, weight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_masked_gemv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    v, tau, weight, scale = ctx.saved_tensors
    mask = reference.kept(v, tau)
    rows = grad.reshape(-1, grad.shape[-1])
    grad_v = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_v = torch.where(mask, grad @ unpack(weight, scale, grad.dtype).t(), grad.new_zeros(()))
    if ctx.needs_input_grad[2]:
        masked = torch.where(mask, v, v.new_zeros(())).reshape(-1, v.shape[-1])
        grad_weight = (masked.t() @ rows).to(weight.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_v, None, grad_weight, grad_bias, None, None


def _save_router(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward_router(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    grad_x = grad @ unpack(weight, scale, grad.dtype) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = (grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
    return grad_x, grad_weight, None


def _save_masked_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:4])


def _backward_masked_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, a, weight, bias = ctx.saved_tensors
    zero = grad.new_zeros(())
    grad_x = grad_a = grad_weight = grad_bias = None
    rows = torch.where(a != 0, grad * a, zero).reshape(-1, a.shape[-1])
    if ctx.needs_input_grad[0]:
        grad_x = (rows @ weight.to(grad.dtype)).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        # made again: as much memory as the hidden rows of an MLP would otherwise wait for this
        up = reference.router(x, weight) if bias is None else reference.router(x, weight) + bias.to(x.dtype)
        grad_a = torch.where(a != 0, grad * up.reshape(a.shape), zero)
    if ctx.needs_input_grad[2]:
        grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0).to(bias.dtype)
    return grad_x, grad_a, grad_weight, grad_bias, None


torch.library.register_autograd("rana::masked_gemv", _backward_masked_gemv, setup_context=_save_masked_gemv, lib=_LIBRARY)
torch.library.register_autograd("rana::router", _backward_router, setup_context=_save_router, lib=_LIBRARY)
torch.library.register_autograd("rana::masked_rows", _backward_masked_rows, setup_context=_save_masked_rows, lib=_LIBRARY)

masked_gemv = torch.ops.rana.masked_gemv.default
masked_gemv_add = torch.ops.rana.masked_gemv_add.default
masked_gemv_parts = torch.ops.rana.masked_gemv_parts.default
masked_gemv_gated = torch.ops.rana.masked_gemv_gated.default
masked_rows = torch.ops.rana.masked_rows.default
router = torch.ops.rana.router.default
normed_router = torch.ops.rana.normed_router.default
