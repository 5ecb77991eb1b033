"""Write an einsum of an activation with a Parameter as the linear layer it is.

    q = einsum("ibh,hnd->ibnd", x, w)
  becomes
    q = linear(x, w.permute(1, 2, 0).reshape(n * d, h)).unflatten(-1, (n, d))

Attention heads kept as dimensions of the weight, contractions over several of them (the output projection) and weights
that stand first are all of this kind. An index that all three have chooses a matrix per element (experts): not a
linear, left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from rana_fx.graph.dataflow import shape_of
from rana_fx.graph.operands import Operand, operand
from rana_fx.graph.ops import op_name


@dataclass(frozen=True)
class Contraction:
    """Letters of the activation x and of the weight w; ``output``: of the result, in its order."""

    x: str
    w: str
    output: str

    @property
    def summed(self) -> str:
        return "".join(letter for letter in self.w if letter in self.x)

    @property
    def kept_x(self) -> str:
        return "".join(letter for letter in self.x if letter not in self.w)

    @property
    def kept_w(self) -> str:
        return "".join(letter for letter in self.w if letter not in self.x)

    @property
    def linear(self) -> bool:
        """Every letter occurs once on each side, summed letters are not in the output and all others are."""
        distinct = all(len(set(letters)) == len(letters) for letters in (self.x, self.w, self.output))
        complete = sorted(self.output) == sorted(self.kept_x + self.kept_w)
        return distinct and complete and bool(self.summed and self.kept_x and self.kept_w)

    @property
    def over_last(self) -> bool:
        """``ti,oi->to`` or ``ti,io->to``: a 2-D weight over the last dimension of x, nothing to permute."""
        plain = len(self.w) == 2 and self.x == self.kept_x + self.summed and self.output == self.kept_x + self.kept_w
        return self.linear and plain


@dataclass(frozen=True, eq=False)
class Einsum:
    """An einsum of two tensors, its letters written out in full."""

    left: str
    right: str
    output: str
    first: fx.Node
    second: fx.Node

    def contractions(self) -> Iterator[tuple[Contraction, fx.Node, fx.Node]]:
        """(letters, x, w), with either operand as the weight; the second comes first."""
        yield Contraction(self.left, self.right, self.output), self.first, self.second
        yield Contraction(self.right, self.left, self.output), self.second, self.first


def parse(node: fx.Node) -> Einsum | None:
    """The einsum a node is; None where it is something else, or has an ellipsis or another number of operands."""
    if node.op != "call_function" or op_name(node) != "einsum" or node.kwargs:
        return None
    equation = node.args[0]
    operands = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    first, second = operands
    return Einsum(left, right, output, first, second) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None


def as_linear(node: fx.Node, weights: Mapping[fx.Node, nn.Parameter]) -> tuple[Any, list[fx.Node]] | None:
    """(a function that builds the linear, its inputs x and w), or None where the einsum is not one."""
    found = parse(node)
    for form, x, w in () if found is None else found.contractions():
        shape = shape_of(w)
        if not isinstance(operand(w, weights), Operand) or operand(x, weights) is not None or not form.linear or shape is None:
            continue
        sizes = dict(zip(form.w, shape, strict=True))
        if not all(isinstance(size, int) for size in sizes.values()):
            continue
        return _builder(form, {letter: int(size) for letter, size in sizes.items()}), [x, w]
    return None


def _builder(form: Contraction, sizes: Mapping[str, int]) -> Any:
    def build(x: Any, w: Any) -> Any:
        x_order = form.kept_x + form.summed
        if x_order != form.x:
            x = x.permute(*(form.x.index(letter) for letter in x_order))
        if len(form.summed) > 1:
            x = x.flatten(-len(form.summed))
        w_order = form.kept_w + form.summed
        if w_order != form.w:
            w = w.permute(*(form.w.index(letter) for letter in w_order))
        if len(w_order) > 2:
            rows, columns = (math.prod(sizes[letter] for letter in part) for part in (form.kept_w, form.summed))
            w = w.reshape(rows, columns)
        y = F.linear(x, w)
        if len(form.kept_w) > 1:
            y = y.unflatten(-1, tuple(sizes[letter] for letter in form.kept_w))
        y_order = form.kept_x + form.kept_w
        if y_order != form.output:
            y = y.permute(*(y_order.index(letter) for letter in form.output))
        return y

    return build
