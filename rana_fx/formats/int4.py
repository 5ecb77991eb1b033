"""4 bits per number, two in a byte, one scale per row and group of 64 or 128 columns; symmetric, round to nearest.

    values uint8 (R, C / 2), scale (R, G) in fp32 or bf16:   w = (nibble - 8) * scale

Byte j of a row holds column 2j in its low and 2j + 1 in its high half; the last group may be shorter. The group length follows
from the shapes. ``pack`` leaves -8 out; others may use it, and scales of either sign (rana_fx/recipes/rana/gptq.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.errors import BadOperand, InvalidOption
from rana_fx.formats.base import Format, Matrix, Span, floating_matrix, half_a_step, register_format, round_to_steps

GROUPS = (64, 128)
LIMIT = 7


class Int4(Format):
    """Error of ``pack``: half a step, |w - dequantize| <= scale / 2 (and what rounding the scale to bf16 clips: 0.4 %)."""

    name = "int4"
    dtypes = (torch.uint8,)
    expects = "torch.uint8 (packed 4 bits)"
    multiple = 2

    def bits(self, dtype: torch.dtype) -> int:  # noqa: ARG002
        return 4

    def columns(self, stored: int) -> int:
        return 2 * stored

    def check(self, matrix: Matrix) -> None:
        (rows, columns), scale = matrix.shape, matrix.scale
        if scale is None or scale.dim() != 2 or scale.shape[0] != rows or not _fitting(columns, scale.shape[1]):
            got = "None" if scale is None else str(tuple(scale.shape))
            expected = " or ".join(f"{(rows, -(-columns // group))}" for group in GROUPS)
            raise BadOperand(name="scale", got=got, expected=f"{expected} for 4 bits", todo="Pass what formats.pack gave.")

    def group(self, matrix: Matrix) -> int:
        """Columns that share one scale. With one group in all, both lengths mean the same."""
        assert matrix.scale is not None
        return _fitting(matrix.shape[1], matrix.scale.shape[1])[0]

    def unit(self, matrix: Matrix) -> int:
        return self.group(matrix)

    def divisible(self, matrix: Matrix, start: int, stop: int) -> bool:
        group = self.group(matrix)
        return start % group == 0 and (stop % group == 0 or stop == matrix.shape[1])

    def spans(self, matrix: Matrix, start: int, stop: int) -> tuple[Span, Span | None]:
        group = self.group(matrix)
        return (start // 2, stop // 2), (start // group, -(-stop // group))

    def pack(self, weight: Tensor, *, scale_dtype: torch.dtype = torch.float32, group: int = 64) -> Matrix:
        """Round a floating matrix (R, C), C even; ``group``: 64 or 128. Raises BadOperand, InvalidOption, NonFinite."""
        if group not in GROUPS:
            raise InvalidOption(name="group", got=group, expected="64 or 128")
        if weight.dim() == 2 and weight.shape[1] % 2:
            raise BadOperand(
                name="weight",
                got=str(tuple(weight.shape)),
                expected="an even number of columns",
                todo="Append a column of zeros, or use 8 bits.",
            )
        floating_matrix(weight)
        q, scale_RG = round_to_steps(weight, LIMIT, group, scale_dtype)
        nibbles = (q + 8).to(torch.uint8)
        return Matrix(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scale_RG, self)

    def dequantize(self, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        assert matrix.scale is not None
        # products in at least fp32: a 4-bit number times a scale is not representable in 16 bits
        wide = torch.promote_types(dtype, torch.float32)
        nibbles = torch.stack([matrix.values & 0xF, matrix.values >> 4], -1).reshape(matrix.shape)
        return ((nibbles.to(wide) - 8) * self._steps(matrix, wide)).to(dtype)

    def error_bound(self, matrix: Matrix) -> Tensor:
        assert matrix.scale is not None
        return half_a_step(self._steps(matrix, torch.float32), LIMIT, matrix.scale.dtype)

    def _steps(self, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """(R, C): each number's scale."""
        assert matrix.scale is not None
        return matrix.scale.to(dtype).repeat_interleave(self.group(matrix), 1)[:, : matrix.shape[1]]


def _fitting(columns: int, count: int) -> list[int]:
    """Group lengths that make ``count`` groups of so many columns."""
    return [group for group in GROUPS if -(-columns // group) == count]


INT4 = register_format(Int4())
