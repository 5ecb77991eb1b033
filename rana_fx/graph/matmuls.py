"""What a matmul multiplies, however the graph spells it.

In: a node that may be a linear layer: ``linear``, ``addmm``, ``addmv``, ``matmul``, ``mm`` or an einsum over the last dimension.
Out: its operands by name, among them whether the matrix is stored (out, in), as ``linear`` takes it, or (in, out).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rana_fx.graph.einsums import parse
from rana_fx.graph.ops import op_name, opaque


@dataclass(frozen=True, eq=False)
class Operands:
    """``x @ matrix + bias``, or ``x @ matrix^T + bias`` where ``out_first``. ``x`` and ``matrix`` may be no nodes."""

    x: object
    matrix: object
    bias: fx.Node | None
    out_first: bool  # the matrix is (out, in)


def operands_of(node: fx.Node) -> Operands | None:
    """The operands of a matmul that may be a linear layer, or None."""
    name = op_name(node)
    if node.kwargs.get("out") is not None or opaque(node) is not None:
        return None  # ``out`` has another shape or dtype; or the node has the name of a matmul and is a different operation
    if name == "linear":
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        x = node.args[0] if node.args else node.kwargs.get("input")
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        return Operands(x, weight, bias if isinstance(bias, fx.Node) else None, out_first=True)
    if name in ("addmm", "addmv"):
        names = ("input", "mat1", "mat2") if name == "addmm" else ("input", "mat", "vec")
        given, first, second = _given(node, *names)
        held = given if isinstance(given, fx.Node) else None
        if name == "addmv":  # the matrix comes first
            return Operands(second, first, held, out_first=True)
        return None if second is None else Operands(first, second, held, out_first=False)
    if name in ("matmul", "mm"):
        first, second = _given(node, "input", "other" if name == "matmul" else "mat2")
        return None if second is None else Operands(first, second, None, out_first=False)
    einsum = parse(node) if name == "einsum" else None
    if einsum is not None:
        form, x, matrix = next(einsum.contractions())  # the matrix comes second, as in ``mm``
        if form.over_last:
            return Operands(x, matrix, None, out_first=form.w[1] in form.summed)
    return None


def _given(node: fx.Node, *names: str) -> list[object]:
    """Arguments by position or by name; None where one is missing."""
    return [node.args[place] if place < len(node.args) else node.kwargs.get(name) for place, name in enumerate(names)]
