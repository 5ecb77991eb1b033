"""Storage formats of matrices: one file each, with pack, dequantize, bytes and error; what stored numbers mean, exactly.

    floating   fp64, fp32, bf16, fp16        w = values                                      floating.py
    int8       int8, one scale per row       w = q * scale                                   int8.py
    int4       uint8, two numbers a byte     w = (nibble - 8) * scale of its group           int4.py

Rounding takes place against the scale as it is stored, so what ``dequantize`` returns *is* the weight: kernels are compared
with it, not with the original. ``register_format`` adds a format, also from outside of the package (base.py); ``Matrix`` is a
matrix in one. The functions below take values and scale apart, as operations and kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.errors import InvalidOption
from rana_fx.formats.base import Format, Matrix, format_of, is_plain, register_format, registered, sources
from rana_fx.formats.floating import FLOATING
from rana_fx.formats.int4 import GROUPS, INT4
from rana_fx.formats.int8 import INT8

__all__ = [
    "FLOATING",
    "GROUPS",
    "INT4",
    "INT8",
    "Format",
    "Matrix",
    "bits_of",
    "format_of",
    "gated_unit",
    "group_of",
    "is_plain",
    "pack",
    "register_format",
    "registered",
    "shape_of",
    "sources",
    "unpack",
]


def bits_of(weight: Tensor) -> int:
    """Bits per number, scales not counted. Raises BadOperand."""
    return format_of(weight).bits(weight.dtype)


def shape_of(weight: Tensor, scale: Tensor | None) -> tuple[int, int]:
    """(rows, columns) of the matrix that is stored. Raises BadOperand where weight and scale do not belong together."""
    return Matrix.of(weight, scale).shape


def group_of(weight: Tensor, scale: Tensor) -> int:
    """Columns that share one scale of a 4-bit weight. With one group in all, both lengths mean the same."""
    return INT4.group(Matrix(weight, scale, INT4))


def gated_unit(weight: Tensor, scale: Tensor | None) -> int:
    """What columns must be a multiple of, for each half of them to be whole words and groups."""
    matrix = Matrix.of(weight, scale)
    return 2 * matrix.format.unit(matrix)


def pack(weight: Tensor, bits: int, group: int = 64, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Round a floating matrix to 8 bits per row or 4 bits per group.

    Args:
        weight: (R, C), finite; C even for 4 bits.
        bits: 8 or 4.
        group: 64 or 128 columns per scale, for 4 bits.
        scale_dtype: what scales are stored in; bfloat16 saves 16 bits per group.

    Returns:
        (values, scale) as int8.py and int4.py describe them, contiguous.

    Raises:
        BadOperand, InvalidOption, NonFinite.
    """
    if bits not in (4, 8):
        raise InvalidOption(name="bits", got=bits, expected="8 or 4")
    if group not in GROUPS:
        raise InvalidOption(name="group", got=group, expected="64 or 128")
    made = INT8.pack(weight, scale_dtype=scale_dtype) if bits == 8 else INT4.pack(weight, scale_dtype=scale_dtype, group=group)
    assert made.scale is not None
    return made.values, made.scale


def unpack(weight: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that is stored, (R, C); a floating weight is only cast. Raises BadOperand."""
    return Matrix.of(weight, scale).dequantize(dtype)
