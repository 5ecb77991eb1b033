"""Lowers the ``rana::`` operations in Inductor by the implementation that the registry chooses (kernels/registry.py).

In: an operation in the graph that AOTAutograd returned. Out: Inductor IR of its result, one of

    a CUDA C++ kernel on tensor cores (GPU, few tokens, where a CUDA graph replays its launch): lower_cuda.py (masked GEMVs),
    lower_cuda_router.py (routers)
    a Triton kernel (GPU, few tokens, where the cost model expects it to be faster): lower_triton.py
    a C++ template (CPU, few tokens): reads only the rows that are kept; lower_cpp.py
    a matmul (everything else): a mask of its input fuses into the producer, one of its output into the consumer; of fused
    forms, the operations they were made of: lower_dense.py

``rana::decode_attention`` has a lowering of its own (lower_attention.py).

All leading dimensions of activations are one dimension for an implementation. Logging at level DEBUG ("rana_fx.passes.lower")
names the implementation of each operation, and the reasons why those before it were not used.

A lowering and not a decomposition: decompositions passed to ``compile_fx`` become part of the FX cache's key, operators
among them cannot be pickled (torch 2.13), and the compilation is then never cached.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings, register_lowering, to_dtype
from torch._inductor.virtualized import V

from rana_fx.kernels import registry
from rana_fx.kernels.ops import arguments_of, without_density
from rana_fx.kernels.problem import Operand, Problem, alignment_of, problem_of
from rana_fx.kernels.triton.config import CPU_TOKENS, MAX_TOKENS
from rana_fx.passes import lower_attention

_aten = torch.ops.aten
_log = logging.getLogger(__name__)
# operands with a row per token
_ACTIVATIONS = ("v", "x", "a", "residual")


def register() -> None:
    """Register these lowerings with Inductor. Called at the first compilation, since importing Inductor takes a second."""
    for op in registry.OPERATIONS:
        target = getattr(torch.ops.rana, op).default
        if target not in lowerings:
            register_lowering(target, type_promotion_kind=None)(_lowering_of(op))
    lower_attention.register()


def _lowering_of(op: str) -> Callable[..., Any]:
    def lower(*args: Any, **kwargs: Any) -> Any:
        view = lowerings[_aten.view.default]
        arguments = arguments_of(op, args, kwargs)
        flat = dict(arguments)
        for name in _ACTIVATIONS:
            if name in flat:
                *lead, inner = flat[name].get_size()
                flat[name] = view(flat[name], [sympy.prod(lead), inner])
        problem = problem_of_ir(op, flat)
        chosen = registry.choose(problem)
        if _log.isEnabledFor(logging.DEBUG):
            passed = "".join(f"; {row.name} {reason}" for row, reason in registry.why(problem))
            _log.debug("%s by %s%s; %s", op, chosen.name, passed, problem)
        y_TN = chosen.code(compiled=True)(problem, *without_density(flat))
        first = next(iter(arguments.values()))
        lead = arguments.get("a", first).get_size()[:-1]
        return view(to_dtype(y_TN, first.get_dtype()), [*lead, y_TN.get_size()[-1]])

    return lower


def problem_of_ir(op: str, arguments: dict[str, Any]) -> Problem:
    """The problem of a call whose activations have one leading dimension. Realizes weights where tokens are few."""
    activations = next(iter(arguments.values()))
    most_tokens = _at_most(activations.get_size()[0])

    def operand_of(node: Any) -> Operand:
        size = tuple(int(n) if isinstance(n, (int, sympy.Integer)) else None for n in node.get_size())
        contiguous, alignment = False, 1
        if node is not activations and most_tokens is not None and None not in size and size:
            layout = ir.ExternKernel.realize_input(node).get_layout()
            strides = [int(stride) for stride in layout.stride]
            contiguous = strides[-1] == 1
            alignment = alignment_of(node.get_dtype().itemsize, int(layout.offset), strides)
        return Operand(size, node.get_dtype(), node.get_device(), contiguous, alignment)

    return problem_of(op, arguments, operand_of, most_tokens=most_tokens, compiled=True)


def _at_most(tokens: Any) -> int | None:
    """The lowest limit of kernels that statically bounds a number of tokens, or None."""
    return next((limit for limit in (CPU_TOKENS, MAX_TOKENS) if V.graph.sizevars.statically_known_leq(tokens, limit)), None)
