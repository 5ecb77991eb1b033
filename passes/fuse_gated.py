"""Fuse act(first half) * second half of the columns of a masked matmul into its launch, in any decomposition.

    g, u = split(rana.masked_gemv(v, tau, At, c), n, -1); e = exp(neg(to_fp32(g))); p = to_bf16(to_fp32(g) / (e + 1)) * u
  becomes
    p = rana.masked_gemv_gated(v, tau, At, c, None, density, "silu")

In: an aten graph past autograd (Inductor's post-grad graph), few tokens on a GPU. Out: the same graph, rewritten in place.

Nodes that depend on y only by views, pointwise operations and numbers compute each element from single elements of y. So they
are run, in fp64 and without their casts, and compared with every activation of the kernel: silu has four decompositions in use
and tanh-GELU has six, and they differ between releases. The test values have y's shape, so the run also shows which columns are
read: halves that are swapped, shifted or interleaved do not fit. Casts are left out since the fused value is rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rana_fx.formats import gated_unit
from rana_fx.graph.dataflow import shape_of, value_of, walk
from rana_fx.graph.ops import ATEN_CASTS, ATEN_MOVES
from rana_fx.kernels.ops import masked_gemv, masked_gemv_gated
from rana_fx.kernels.reference import ACTIVATIONS
from rana_fx.passes.base import PassResult, PostGrad
from rana_fx.passes.fusible import fuse_each, operands, put, replace

_aten = torch.ops.aten
# casts to these only round intermediate values; rounding to fewer bits (fp8) is part of what a model computes
ROUNDINGS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# bound on the error of the kernel's fp32 arithmetic, relative to the activation's argument
_BOUND = 8 * torch.finfo(torch.float32).eps


def fuse_gated(graph_module: fx.GraphModule, context: PostGrad) -> PassResult:
    """Fuse every masked matmul whose first half of columns gates the second."""
    return fuse_each(graph_module, masked_gemv, "masked_gemv_gated", context, _fuse)


def _fuse(node: fx.Node) -> str | None:
    """Fuses the gate, or returns the reason why not."""
    found = gated_of(node)
    if found is None:
        return "no known activation of the first half of its columns times the second half follows"
    product, activation = found
    fused = put(product, masked_gemv_gated, (*operands(node).values(), activation))
    result, wanted = fused, product.meta["val"].shape
    if wanted != fused.meta["val"].shape:
        result = put(product, _aten.reshape.default, (fused, list(wanted)))
    if not replace(product, result):
        if result is not fused:
            node.graph.erase_node(fused)
        return "the gated value has another memory layout"
    # the nodes it was computed from have no other reader: the runner removes them as dead code
    return None


def gated_of(y: fx.Node) -> tuple[fx.Node, str] | None:
    """(the node that is act(first half) * second half of y, the activation's name), or None."""
    value, (weight, scale) = value_of(y), _weight_of(y)
    if not isinstance(value, Tensor) or weight is None or not all(isinstance(size, int) for size in value.shape):
        return None
    if value.shape[-1] % gated_unit(weight, scale):
        return None
    region = _elementwise_after(y)
    for node in region:
        found = value_of(node)
        if not isinstance(found, Tensor) or (found.dtype, 2 * found.numel()) != (value.dtype, value.numel()):
            continue
        behind = _behind(node, y)
        steps = [step for step in region if step in behind]
        # a node with another reader must be computed anyway
        if all(user in steps for step in (y, *steps) if step is not node for user in step.users):
            name = _activation(y, steps)
            if name is not None:
                return node, name
    return None


def _weight_of(y: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    """Fake values of the weight and its scale."""
    given = operands(y)
    values = [value_of(node) if isinstance(node, fx.Node) else None for node in (given["weight"], given["scale"])]
    weight, scale = (value if isinstance(value, Tensor) else None for value in values)
    return weight, scale


def _elementwise_after(y: fx.Node) -> list[fx.Node]:
    """Nodes computed from y alone, by views and pointwise operations, in the graph's order."""
    found, todo = {y}, list(y.users)
    while todo:
        node = todo.pop()
        # visited again after its last input is found
        if node not in found and _is_elementwise(node, found):
            found.add(node)
            todo.extend(node.users)
    return sorted(found - {y})


def _is_elementwise(node: fx.Node, inputs: set[fx.Node]) -> bool:
    """Whether a node is a view or a pointwise operation of ``inputs`` and of numbers."""
    if node.op != "call_function" or not node.all_input_nodes or not inputs.issuperset(node.all_input_nodes):
        return False
    if node.target in ATEN_MOVES or node.target in ATEN_CASTS:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags


def _behind(node: fx.Node, y: fx.Node) -> set[fx.Node]:
    """The nodes that ``node`` is computed from, itself included, y excluded."""
    return set(walk([node], lambda step: [source for source in step.all_input_nodes if source is not y]))


def _activation(y: fx.Node, steps: list[fx.Node]) -> str | None:
    """The activation with which the last of ``steps`` is the gated value of y, identified by its values."""
    shape = shape_of(y)
    assert shape is not None
    # the compiler runs passes in a mode in which new tensors are fake
    with unset_fake_temporarily():
        return _fitting(y, steps, shape)


def _fitting(y: fx.Node, steps: list[fx.Node], shape: torch.Size) -> str | None:
    tokens, half = math.prod(shape[:-1]), shape[-1] // 2
    names = set(ACTIVATIONS)
    for first, second in _samples(tokens * half):
        value = torch.cat([first.view(tokens, half), second.view(tokens, half)], -1).view(shape)
        got = _run(y, value, steps)
        if got is None or got.numel() != first.numel():
            return None
        exact = second * _exact(first)
        error = (got.reshape(-1) - exact).abs()
        fits = ((error <= _BOUND * (first * second).abs()) | (got.reshape(-1).isnan() & exact.isnan())).all(1)
        names &= {name for name, fit in zip(ACTIVATIONS, fits.tolist(), strict=True) if fit}
        if not names:
            return None
    return names.pop() if len(names) == 1 else None


@functools.cache
def _arguments() -> Tensor:
    """Arguments to compare activations at: dense where their curvature is large, and up to the fp16 range for clamped ones."""
    far = torch.logspace(math.log10(12), math.log10(65_000), 200, dtype=torch.float64, device="cpu")
    return torch.cat([torch.linspace(-12, 12, 1000, dtype=torch.float64, device="cpu"), far, -far])


def _samples(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All arguments, ``count`` at a time, and as many factors of all magnitudes; neighbouring factors differ. Last, NaN on
    either side."""
    everything = _arguments()
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(everything), count):
        index = (start + torch.arange(count, device="cpu")) % len(everything)
        uniform = 2 * torch.rand(count, generator=generator, dtype=torch.float64, device="cpu") - 1
        # 1e-3 ... 65000 of either sign
        yield everything[index], uniform.sign() * 10 ** (7.8 * uniform.abs() - 3)
    # the kernel's activations yield NaN for NaN
    nan, one = (torch.full((count,), value, dtype=torch.float64, device="cpu") for value in (math.nan, 1.0))
    yield nan, one
    yield one, nan


def _exact(x: Tensor) -> Tensor:
    """(activations, ...) fp64."""
    return torch.stack([activation(x) for activation in ACTIVATIONS.values()])


def _run(y: fx.Node, value: Tensor, steps: list[fx.Node]) -> Tensor | None:
    """The last of ``steps`` for a value of y, in fp64 where it is floating."""
    values: dict[fx.Node, Any] = {y: value}
    try:
        for node in steps:
            target: Any = _cast if node.target in ATEN_CASTS else node.target
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = target(*args, **kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        # not recognised as act(first half) * second half
        return None
    result = values[steps[-1]]
    return result if isinstance(result, Tensor) and result.dtype == torch.float64 else None


def _cast(value: Tensor, dtype: torch.dtype | None = None, **_: object) -> Tensor:
    if dtype is not None and dtype not in ROUNDINGS:
        raise TypeError(dtype)
    return value.double()
