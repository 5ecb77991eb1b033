"""Lowers ``rana::decode_attention`` in Inductor.

In: Inductor IR of the operation's arguments. Out: IR of its result, (B, H, T, E) with the memory layout of (B, T, H, E), from

    the C++ template (CPU), whose result is fp32: the cast to q's dtype, and whatever else is pointwise, is fused into it
    the launch of a Triton kernel (GPU)
    the eager operation (other dtypes, more tokens or channels, sizes that vary)

q, k, v and the mask are read with the strides that they have: a cache is not copied.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering, to_dtype

from rana_fx.kernels.attention import decode_attention, why_not_compiled
from rana_fx.passes.ir_nodes import boxed, unboxed
from rana_fx.passes.launch import counters, starts_early, traced

_aten = torch.ops.aten


def register() -> None:
    """Register the lowering with Inductor, once."""
    if decode_attention not in lowerings:
        register_lowering(decode_attention, type_promotion_kind=None)(_lower)


def _lower(q: Any, k: Any, v: Any, mask: Any = None, scale: float = 1.0) -> Any:
    if not _compiled(q, k, v):
        return fallback_handler(decode_attention, add_to_fallback_set=False)(q, k, v, mask, scale)
    if mask is not None:
        sizes = [*q.get_size()[:3], k.get_size()[2]]
        mask = as_laid_out(lowerings[_aten.expand.default](as_laid_out(mask), sizes))
    kernel = _template if q.get_device().type == "cpu" else _launch
    return kernel(as_laid_out(q), _rows(k), _rows(v), mask, scale)


def _compiled(q: Any, k: Any, v: Any) -> bool:
    """Whether a kernel computes a call of these operands."""
    sizes = [size for x in (q, k, v) for size in x.get_size()]
    if not all(isinstance(size, (int, sympy.Integer)) for size in sizes) or 0 in sizes:
        return False
    channels = int(q.get_size()[3]), int(v.get_size()[3])
    return why_not_compiled(q.get_device(), q.get_dtype(), int(q.get_size()[2]), channels) is None


def _template(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    from rana_fx.kernels.cpp.decode_attention import DecodeAttentionTemplate

    batch, heads, tokens, _ = (int(size) for size in q.get_size())
    columns = heads * int(v.get_size()[3])
    size = [sympy.Integer(batch * tokens), sympy.Integer(columns)]
    layout = ir.FixedLayout(q.get_device(), torch.float32, size, [size[1], sympy.S.One])
    template: Any = DecodeAttentionTemplate(*map(unboxed, (q, k, v, mask)), layout=layout, scale=scale)
    y = to_dtype(template.generate().output_node(), q.get_dtype())
    y = lowerings[_aten.view.default](y, [batch, tokens, heads, columns // heads])
    return lowerings[_aten.permute.default](y, [0, 2, 1, 3])


def _launch(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """The launcher takes q, k, v, the mask expanded to (B, H, T, S) or None, and counters (config.COUNTERS)."""
    from rana_fx.kernels.triton import decode_attention as kernel
    from rana_fx.kernels.triton.config import Launch

    # the kernel reads nothing before the kernel that computes q is done
    early = starts_early(q, ())

    def launch(q: Any, k: Any, v: Any, mask: Any, zeros: Any) -> Any:
        return kernel.decode_attention(q, k, v, mask, scale=scale, counters=zeros, how=Launch(traced=True, pdl=early))

    return traced(launch, [q, k, v, mask, counters(q.get_device())], key=("decode_attention", scale, early))


def as_laid_out(node: Any) -> Any:
    """An operand in memory: a view keeps its strides, and what is computed keeps the order in which it is computed."""
    node = ir.ExternKernel.realize_input(node)
    buffer = unboxed(node)
    if isinstance(buffer.get_layout(), ir.FlexibleLayout):
        buffer.freeze_layout()
    return boxed(node)


def _rows(node: Any) -> Any:
    """Keys or values in memory, with contiguous channels."""
    node = as_laid_out(node)
    return node if node.get_stride()[-1] == 1 else as_laid_out(ir.ExternKernel.require_contiguous(node))
