"""Rewrite an einsum of an activation with a Parameter, or an equivalent product (tensordot, inner, mv), as a linear layer.

    q = einsum("ibh,hnd->ibnd", x, w)
  becomes
    q = linear(x, w.permute(1, 2, 0).reshape(n * d, h)).unflatten(-1, (n, d))

Attention heads kept as dimensions of the weight, contractions over several of them (the output projection) and weights
that stand first are all of this kind, in any spelling: with an ellipsis, without an output, dimensions as numbers. An index
that all three have chooses a matrix per element (experts): not a linear, left as it is.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rana_fx.graph.dataflow import shape_of, statically_equal
from rana_fx.graph.operands import Operand, operand
from rana_fx.graph.ops import is_call, op_name, opaque

_SECOND = ("b", "other", "vec", "vec2", "mat2", "tensor2")  # names of the second operand
SPELLINGS = ("einsum", "tensordot", "inner", "mv", "matmul")  # operations that ``parse`` accepts


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
        return distinct and complete and bool(self.summed and self.kept_w)

    @property
    def over_last(self) -> bool:
        """``ti,oi->to`` or ``ti,io->to``: a 2-D weight over the last dimension of x, nothing to permute."""
        plain = len(self.w) == 2 and self.x == self.kept_x + self.summed and self.output == self.kept_x + self.kept_w
        return self.linear and plain and bool(self.kept_x)


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
    """The node as an einsum of two tensors (tensordot, inner and mv included), or None."""
    if not is_call(node) or opaque(node) is not None:
        return None
    name = op_name(node)
    if name == "einsum":
        return _parsed(node)
    operands = [*node.args, *(node.kwargs[key] for key in _SECOND if key in node.kwargs)][:2]
    ranks = [len(shape) if (shape := shape_of(item)) is not None else 0 for item in operands if isinstance(item, fx.Node)]
    if len(ranks) != 2 or not all(ranks):
        return None
    if name == "tensordot":
        return _contraction(operands, ranks, node.kwargs.get("dims", node.args[2] if len(node.args) > 2 else 2))
    if name == "inner":
        return _contraction(operands, ranks, ([-1], [-1]))
    if name == "mv" or (name == "matmul" and ranks == [2, 1]):
        return _contraction(operands, ranks, 1)
    return None


def _contraction(operands: list[Any], ranks: list[int], dims: Any) -> Einsum | None:
    """A sum over the last ``dims`` dimensions of one tensor and the first of another, or over those listed for each."""
    if isinstance(dims, int):
        dims = range(ranks[0] - dims, ranks[0]), range(dims)
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        return None
    summed = [[dim % rank for dim in side] for side, rank in zip(dims, ranks, strict=True)]
    left = string.ascii_lowercase[: ranks[0]]
    right = list(string.ascii_uppercase[: ranks[1]])
    for one, other in zip(*summed, strict=True):
        right[other] = left[one]
    output = "".join(letter for letter in (*left, *right) if (letter in left) != (letter in right))
    return Einsum(left, "".join(right), output, operands[0], operands[1])


def _parsed(node: fx.Node) -> Einsum | None:
    """The einsum of an equation or of lists of dimensions, with or without an ellipsis, spaces and an output; else None."""
    if node.kwargs or not node.args:
        return None
    if isinstance(node.args[0], str):
        operands = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        inputs, _, output = node.args[0].replace(" ", "").partition("->")
        terms: list[str] = inputs.split(",")
        result: str | None = output if "->" in node.args[0] else None
    else:  # x, [0, 1], w, [2, 1], [0, 2]
        operands = node.args[: len(node.args) // 2 * 2 : 2]
        lists = [_letters(item) for item in (*node.args[1::2], *node.args[len(node.args) // 2 * 2 :])]
        if any(item is None for item in lists):
            return None
        terms = [item or "" for item in lists[: len(operands)]]
        result = lists[len(operands)] if len(lists) > len(operands) else None
    if len(operands) != 2 or len(terms) != 2 or not all(isinstance(item, fx.Node) for item in operands):
        return None
    first, second = operands
    if any("." in term for term in (*terms, result or "")):
        expanded = _without_ellipsis(terms, result, [shape_of(first), shape_of(second)])  # type: ignore[arg-type]
        return None if expanded is None else Einsum(*expanded, first, second)  # type: ignore[arg-type]
    return Einsum(terms[0], terms[1], _implied(terms) if result is None else result, first, second)  # type: ignore[arg-type]


def _letters(dimensions: object) -> str | None:
    if not isinstance(dimensions, (tuple, list)):
        return None
    known = string.ascii_uppercase + string.ascii_lowercase  # as PyTorch numbers them
    return "".join("..." if item is Ellipsis else known[item] for item in dimensions)


def _implied(terms: Sequence[str]) -> str:
    """The output of an equation without one: letters that occur once, in order."""
    return "".join(sorted(letter for letter in "".join(terms) if letter != "." and "".join(terms).count(letter) == 1))


def _without_ellipsis(
    terms: Sequence[str], result: str | None, shapes: Sequence[torch.Size | None]
) -> tuple[str, str, str] | None:
    """(left, right, output) with letters for the dimensions of an ellipsis; None where these broadcast or are not known."""
    spare = [letter for letter in string.ascii_letters if letter not in "".join((*terms, result or ""))]
    counts = [0 if "..." not in t or s is None else len(s) - len(t) + 3 for t, s in zip(terms, shapes, strict=True)]
    if any(shape is None for shape in shapes) or min(counts) < 0 or max(counts) > len(spare):
        return None
    extra = spare[: max(counts)]
    hidden = [[*shape][term.index(".") :][:count] for term, shape, count in zip(terms, shapes, counts, strict=True) if count]  # type: ignore[misc]
    if len(hidden) == 2 and not all(statically_equal(a, b) for a, b in zip(*(sizes[::-1] for sizes in hidden), strict=False)):
        return None
    output = "..." + _implied(terms) if result is None else result
    left, right = (t.replace("...", "".join(extra[len(extra) - n :])) for t, n in zip(terms, counts, strict=True))
    return left, right, output.replace("...", "".join(extra))


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
