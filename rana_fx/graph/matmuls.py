"""What a matmul multiplies, however the graph spells it.

In: a node that may be a linear layer: ``linear``, ``addmm``, ``matmul``, ``mm`` or an einsum over the last dimension. Out: its
operands by name, among them whether the matrix is stored (out, in), as ``linear`` takes it, or (in, out).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rana_fx.graph.einsums import parse
from rana_fx.graph.ops import op_name


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
    if name == "linear":
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        x = node.args[0] if node.args else node.kwargs.get("input")
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        return Operands(x, weight, bias if isinstance(bias, fx.Node) else None, out_first=True)
    if name == "addmm" and len(node.args) >= 3:
        bias = node.args[0]
        return Operands(node.args[1], node.args[2], bias if isinstance(bias, fx.Node) else None, out_first=False)
    if name in ("matmul", "mm") and len(node.args) >= 2:
        return Operands(node.args[0], node.args[1], None, out_first=False)
    einsum = parse(node) if name == "einsum" else None
    if einsum is not None:
        form, x, matrix = next(einsum.contractions())  # the matrix comes second, as in ``mm``
        if form.over_last:
            return Operands(x, matrix, None, out_first=form.w[1] in form.summed)
    return None
