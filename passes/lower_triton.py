"""``rana::masked_gemv`` and ``rana::router`` on a GPU: the launch of the Triton kernel, as nodes that Inductor lowers.

In: Inductor IR of the operands, a few tokens. Out: IR of the result. The launcher of ``rana_fx.kernels`` is traced on fake
tensors with the operands' sizes and strides, which leaves its launch and the buffers around it in a small graph; Inductor lowers
that graph, writes the kernel into its own module and tunes nothing else around it. The masked product comes as fp32 partials
whose sum is pointwise here: it fuses, with bias, activation and residual, into the kernel that reads the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import process_subgraph_nodes
from torch._inductor.virtualized import V, ops
from torch.fx.experimental.proxy_tensor import make_fx

from rana_fx.kernels import cost
from rana_fx.kernels.config import MAX_TOKENS, TOKENS_AT_ONCE, Config, default_config
from rana_fx.kernels.quantize import bits_of, shape_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def masked_product(v_TK: Any, tau: Any, weight: Any, scale: Any, density: float) -> Any:
    """(T, N) fp32 without bias, or None where the dense product is expected to be faster or the kernel does not apply."""
    tokens = tokens_of(v_TK)
    if tokens is None:
        return None
    operands = _realized(v_TK, tau, weight, scale)
    fakes = [None if node is None else _fake(node) for node in operands]
    _, _, fake_weight, fake_scale = fakes
    assert fake_weight is not None
    ranks, columns = shape_of(fake_weight, fake_scale)
    bits = bits_of(fake_weight)
    if bits == 16 and fake_weight.stride(1) != 1:
        return None  # a skipped row would not be a skipped stretch of memory
    device = _device(v_TK)
    if not cost.prefers_masked(ranks, columns, tokens, density, device, bits=bits):
        return None
    config = default_config(ranks, columns, tokens, density, device.sm_count, bits=bits)
    parts = _traced(lambda *given: _partials(config, *given), operands, fakes)
    return _sum_of(parts, config.splits, tokens, columns)


def router_product(x_TI: Any, weight: Any, scale: Any) -> Any:
    """(T, R) in x's dtype, or None where the kernel does not apply."""
    tokens = tokens_of(x_TI)
    # above a few tokens a floating weight is read by a matrix product as fast, and multiplied faster
    if tokens is None or (scale is None and tokens > TOKENS_AT_ONCE):
        return None
    operands = _realized(x_TI, weight, scale)
    return _traced(_router, operands, [None if node is None else _fake(node) for node in operands])


def tokens_of(x_TK: Any) -> int | None:
    """The number of tokens on a GPU, where it is known and small enough for the kernels."""
    tokens = x_TK.get_size()[0]
    few = isinstance(tokens, (int, sympy.Integer)) and 1 <= int(tokens) <= MAX_TOKENS
    return int(tokens) if few and x_TK.get_device().type == "cuda" and x_TK.get_dtype() in _DTYPES else None


def _partials(config: Config, v: Any, tau: Any, weight: Any, scale: Any) -> Any:
    from rana_fx.kernels.masked_gemv import partials

    return partials(v, tau, weight, scale, config=config, traced=True)


def _router(x: Any, weight: Any, scale: Any) -> Any:
    from rana_fx.kernels.router import router

    return router(x, weight, scale, traced=True)


def _sum_of(parts: Any, splits: int, tokens: int, columns: int) -> Any:
    load = parts.make_loader()

    def inner(index: Any) -> Any:
        total = load([sympy.S.Zero, *index])
        for part in range(1, splits):
            total = ops.add(total, load([sympy.Integer(part), *index]))
        return total

    size = [sympy.Integer(tokens), sympy.Integer(columns)]
    return ir.Pointwise.create(device=parts.get_device(), dtype=torch.float32, inner_fn=inner, ranges=size)


def _traced(launch: Callable[..., Any], operands: list[Any], fakes: list[Any]) -> Any:
    """Lower what ``launch`` does to the operands (an operand may be None)."""
    given = [i for i, node in enumerate(operands) if node is not None]

    def run(*tensors: Any) -> Any:
        values: list[Any] = [None] * len(operands)
        for i, tensor in zip(given, tensors, strict=True):
            values[i] = tensor
        return launch(*values)

    with V.fake_mode:  # the launcher's own buffers are fake, too
        graph = make_fx(run)(*(fakes[i] for i in given))
    return process_subgraph_nodes(graph, [operands[i] for i in given])


def _realized(*nodes: Any) -> list[Any]:
    """Operands with memory and fixed strides (a weight may be any view; what is computed here is made contiguous)."""
    made = []
    for node in nodes:
        if node is not None:
            node = ir.ExternKernel.realize_input(node)
            if not isinstance(node, ir.ReinterpretView):
                node = ir.ExternKernel.require_contiguous(node)
            if not isinstance(node, ir.TensorBox):
                node = ir.TensorBox(node if isinstance(node, (ir.BaseView, ir.StorageBox)) else ir.StorageBox(node))
        made.append(node)
    return made


def _fake(node: Any) -> torch.Tensor:
    """A fake tensor of a node's sizes and strides."""
    size, stride = ([int(n) for n in many] for many in (node.get_size(), node.get_stride()))
    with V.fake_mode:
        return torch.empty_strided(size, stride, dtype=node.get_dtype(), device=node.get_device())


def _device(node: Any) -> cost.Device:
    """The measured device nearest to the one compiled for."""
    properties = torch.cuda.get_device_properties(node.get_device())
    nearest = cost.H100 if "H100" in properties.name else cost.H200
    return dataclasses.replace(nearest, sm_count=properties.multi_processor_count)
