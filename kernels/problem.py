"""What is known of one call of an operation, as far as the choice of an implementation depends on it.

In: the operation's arguments by name, and a function that reads an ``Operand`` from one: tensors in eager mode
(``operand_of_tensor``), Inductor's IR when a graph is lowered (passes/lower.py). Out: a ``Problem``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rana_fx import formats

# activations that kernels read and results that they write
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Operand:
    """Sizes are numbers, or None where they vary. contiguous_rows: neighbours in a row are neighbours in memory. alignment: bytes
    of which the places of all rows are multiples, as far as offset and stride tell: 1, 2, 4, 8 or 16.
    """

    size: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device
    contiguous_rows: bool = True
    alignment: int = 16


@dataclass(frozen=True)
class Problem:
    """One call of an operation.

    op: its name, without "rana::". dtype: of the activations. tokens: all their leading dimensions, None where the number varies;
    most_tokens: a bound on it, where one is known. rows, columns: of the weight as a matrix, None where they vary; of several
    weights beside each other, all columns. stored: the dtype of the weight's memory; bits: of one of its numbers.
    contiguous_rows: neighbours in a row are neighbours in memory, so that a row that is skipped is memory that is not read.
    alignment, scale_alignment: of rows of the weight and of its scales, in bytes, up to 16; of several weights also of the length
    of their rows.
    density: the expected fraction of kept rows. gated: whether one half of the columns gates the other.
    weights: how many there are; alike: they have one dtype. compiled: lowered by
    Inductor, not run in eager mode.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    tokens: int | None
    most_tokens: int | None
    rows: int | None
    columns: int | None
    stored: torch.dtype
    bits: int
    contiguous_rows: bool = True
    alignment: int = 16
    scale_alignment: int = 16
    density: float = 0.5
    gated: bool = False
    weights: int = 1
    alike: bool = True
    compiled: bool = True

    @property
    def quantized(self) -> bool:
        """Whether the weight's memory holds something else than its numbers in a floating dtype."""
        return not formats.is_plain(self.stored)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(rows, columns, tokens) where all are known."""
        assert self.rows is not None and self.columns is not None and self.tokens is not None
        return self.rows, self.columns, self.tokens


def problem_of(
    op: str,
    arguments: Mapping[str, Any],
    operand_of: Callable[[Any], Operand],
    *,
    most_tokens: int | None = None,
    compiled: bool,
) -> Problem:
    """The problem of a call.

    Args:
        arguments: all of the operation, defaults included, by name and in its order: the first are activations.
        most_tokens: a bound on a number of tokens that varies.
    """
    activations = operand_of(next(iter(arguments.values())))
    weights = [operand_of(weight) for weight in (arguments["weights"] if "weights" in arguments else (arguments["weight"],))]
    tokens = _product(activations.size[:-1])
    first, bits = weights[0], bits_of(weights[0].dtype)
    widths = [weight.size[-1] for weight in weights]
    columns = None if None in widths else sum(width for width in widths if width is not None)
    return Problem(
        op=op,
        device=activations.device,
        dtype=activations.dtype,
        tokens=tokens,
        most_tokens=most_tokens if tokens is None else tokens,
        rows=first.size[0],
        columns=None if columns is None else formats.format_of(first.dtype).columns(columns),
        stored=first.dtype,
        bits=bits,
        contiguous_rows=all(weight.contiguous_rows for weight in weights),
        alignment=_alignment_of_all(weights),
        scale_alignment=16 if arguments.get("scale") is None else operand_of(arguments["scale"]).alignment,
        density=float(arguments.get("density", 1.0)),
        gated=arguments.get("activation") is not None,
        weights=len(weights),
        alike=all(weight.dtype == first.dtype for weight in weights),
        compiled=compiled,
    )


def operand_of_tensor(tensor: Tensor) -> Operand:
    """Of a tensor whose sizes are numbers."""
    contiguous = tensor.dim() > 0 and tensor.stride(-1) == 1
    alignment = alignment_of(tensor.element_size(), tensor.storage_offset(), tensor.stride())
    return Operand(tuple(tensor.shape), tensor.dtype, tensor.device, contiguous, alignment)


def alignment_of(size: int, offset: int | torch.SymInt, strides: Sequence[int]) -> int:
    """``Operand.alignment`` of elements of ``size`` bytes; 1 for a matrix whose rows are not contiguous."""
    if len(strides) > 1 and strides[-1] != 1:
        return 1
    return math.gcd(16, size * int(offset), *(size * stride for stride in strides[:-1]))


def _alignment_of_all(weights: Sequence[Operand]) -> int:
    """Of the rows of one weight or, of several, of which each begins where the one before it ends, of these places, too."""
    lengths = [weight.dtype.itemsize * (weight.size[-1] or 1) for weight in weights] if len(weights) > 1 else []
    return math.gcd(*(weight.alignment for weight in weights), *lengths)


def _product(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None


@functools.cache
def bits_of(stored: torch.dtype) -> int:
    """Bits of a number of a weight that is stored in a dtype. Raises BadOperand."""
    return formats.bits_of(torch.empty(0, dtype=stored, device="meta"))
