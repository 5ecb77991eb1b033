"""``rana::masked_gemv``, ``router`` and ``masked_rows`` on a CPU: the C++ templates of rana_fx.kernels, where they apply.

In: Inductor IR of the operands. Out: IR of the result in fp32, without a bias, that what follows is fused into; or None for
more than a few tokens, for dtypes the templates do not know, for a weight of symbolic size, and for a floating weight whose rows
are not contiguous.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.virtualized import V

from rana_fx.formats import INT4, INT8, format_of, is_plain
from rana_fx.kernels.cost import prefers_rows_on_cpu
from rana_fx.kernels.cpp.masked_gemv import MaskedGemvTemplate
from rana_fx.kernels.cpp.masked_rows import MaskedRowsTemplate
from rana_fx.kernels.cpp.router import RouterTemplate
from rana_fx.kernels.cpp.template import DTYPES, MAX_TOKENS

_QUANTISED = (*INT8.dtypes, *INT4.dtypes)


def masked_product(v_TK: Any, tau: Any, weight: Any, scale: Any) -> Any:
    """(T, N), or None."""
    tokens = v_TK.get_size()[0]
    if not V.graph.sizevars.statically_known_leq(tokens, MAX_TOKENS) or not _known(v_TK, weight):
        return None
    rows = _rows(weight)
    if rows is None:
        return None
    layout = _layout(weight, tokens, _columns(weight))
    template: Any = MaskedGemvTemplate(_realized(v_TK), _realized(tau), rows, _realized(scale), layout)
    return template.generate().output_node()


def router_product(x_TD: Any, weight: Any, scale: Any) -> Any:
    """(T, R), or None."""
    tokens = x_TD.get_size()[0]
    rows = _rows(weight) if _few(tokens) and _known(x_TD, weight) else None
    if rows is None:
        return None
    template: Any = RouterTemplate(_realized(x_TD), rows, _realized(scale), _layout(weight, tokens, weight.get_size()[0]))
    return template.generate().output_node()


def rows_product(x_TK: Any, a_TN: Any, weight: Any, bias: Any, density: float) -> Any:
    """(T, N) of ``masked_rows``, bias and all, or None, also where masks are expected to cover too much."""
    tokens, bits = x_TK.get_size()[0], 8 * weight.get_dtype().itemsize
    pays = _few(tokens) and prefers_rows_on_cpu(int(tokens), density, bits=bits)
    rows = _rows(weight) if pays and _known(x_TK, weight) else None
    if rows is None:
        return None
    layout = _layout(weight, tokens, weight.get_size()[0])
    template: Any = MaskedRowsTemplate(_realized(x_TK), _realized(a_TN), rows, _realized(bias), layout)
    return template.generate().output_node()


def _few(tokens: Any) -> bool:
    return isinstance(tokens, (int, sympy.Integer)) and 1 <= int(tokens) <= MAX_TOKENS


def _known(x: Any, weight: Any) -> bool:
    fixed = all(isinstance(size, (int, sympy.Integer)) for size in weight.get_size())
    dtypes = x.get_dtype() in DTYPES and weight.get_dtype() in DTYPES + _QUANTISED
    return x.get_device().type == "cpu" and fixed and dtypes


def _columns(weight: Any) -> Any:
    return format_of(weight.get_dtype()).columns(weight.get_size()[1])


def _rows(weight: Any) -> Any:
    """The weight in memory, rows contiguous. A quantised one that lies otherwise is copied: nothing else could multiply by it."""
    node = ir.ExternKernel.realize_input(weight)
    if node.get_stride()[1] != 1 and is_plain(weight.get_dtype()):
        return None
    return _unboxed(node if node.get_stride()[1] == 1 else ir.ExternKernel.require_contiguous(node))


def _realized(node: Any) -> Any:
    if node is None:
        return None
    return _unboxed(ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node)))


def _layout(weight: Any, tokens: Any, columns: Any) -> ir.FixedLayout:
    size = [sympy.sympify(tokens), sympy.sympify(columns)]
    return ir.FixedLayout(weight.get_device(), torch.float32, size, [size[1], sympy.S.One])


def _unboxed(node: Any) -> Any:
    while isinstance(node, (ir.TensorBox, ir.StorageBox)):
        node = node.data
    return node
