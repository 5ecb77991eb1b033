"""``rana::masked_gemv``, ``router`` and ``masked_rows`` on a CPU: the C++ templates of rana_fx.kernels.

In: the problem, which the templates accept (kernels/cpp/implementations.py), and Inductor IR of an operation's arguments without
``density``, (tokens, ...). Out: IR of the result in fp32, (tokens, columns), into which pointwise consumers are fused.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings

from rana_fx.kernels.cpp.masked_gemv import MaskedGemvTemplate
from rana_fx.kernels.cpp.masked_rows import MaskedRowsTemplate
from rana_fx.kernels.cpp.router import RouterTemplate
from rana_fx.kernels.problem import Problem
from rana_fx.passes.ir_nodes import unboxed


def masked_gemv(problem: Problem, v_TK: Any, tau: Any, weight: Any, bias: Any, scale: Any) -> Any:
    """The template, then a pointwise addition of the bias, (tokens, columns)."""
    layout = _layout(v_TK, problem.columns)
    rows = _rows(weight)
    template: Any = MaskedGemvTemplate(_realized(v_TK), _realized(tau), rows, _realized(scale), layout)
    y_TN = template.generate().output_node()
    return y_TN if bias is None else lowerings[torch.ops.aten.add.Tensor](y_TN, bias)


def router(problem: Problem, x_TD: Any, weight: Any, scale: Any) -> Any:
    """The template, (tokens, ranks)."""
    rows = _rows(weight)
    template: Any = RouterTemplate(_realized(x_TD), rows, _realized(scale), _layout(x_TD, problem.rows))
    return template.generate().output_node()


def masked_rows(problem: Problem, x_TK: Any, a_TN: Any, weight: Any, bias: Any) -> Any:
    """The template, which includes the bias, (tokens, columns)."""
    rows = _rows(weight)
    template: Any = MaskedRowsTemplate(_realized(x_TK), _realized(a_TN), rows, _realized(bias), _layout(x_TK, problem.rows))
    return template.generate().output_node()


def _rows(weight: Any) -> Any:
    """The weight, realized, with contiguous rows: a quantized one with other strides is copied."""
    node = ir.ExternKernel.realize_input(weight)
    return unboxed(node if node.get_stride()[1] == 1 else ir.ExternKernel.require_contiguous(node))


def _realized(node: Any) -> Any:
    if node is None:
        return None
    return unboxed(ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node)))


def _layout(activations: Any, columns: int | None) -> ir.FixedLayout:
    size = [sympy.sympify(activations.get_size()[0]), sympy.sympify(columns)]
    return ir.FixedLayout(activations.get_device(), torch.float32, size, [size[1], sympy.S.One])
