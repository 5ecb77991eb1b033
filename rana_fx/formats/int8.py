"""8 bits per number, one scale per row; symmetric, round to nearest.

values int8 (R, C), scale (R,) in fp32 or bf16:   w = q * scale,   |q| <= 127
"""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.errors import BadOperand
from rana_fx.formats.base import Format, Matrix, floating_matrix, half_a_step, register_format, round_to_steps

LIMIT = 127


class Int8(Format):
    """Error of ``pack``: half a step, |w - dequantize| <= scale / 2 (and what rounding the scale to bf16 clips: 0.4 %)."""

    name = "int8"
    dtypes = (torch.int8,)
    expects = "torch.int8 (8 bits)"

    def bits(self, dtype: torch.dtype) -> int:  # noqa: ARG002
        return 8

    def check(self, matrix: Matrix) -> None:
        scale, rows = matrix.scale, matrix.values.shape[0]
        if scale is None or tuple(scale.shape) != (rows,):
            got = "None" if scale is None else str(tuple(scale.shape))
            raise BadOperand(name="scale", got=got, expected=f"({rows},) for an int8 weight", todo="Pass what formats.pack gave.")

    def unit(self, matrix: Matrix) -> int:  # noqa: ARG002
        return 4  # numbers of a 32-bit word

    def pack(self, weight: Tensor, *, scale_dtype: torch.dtype = torch.float32) -> Matrix:
        floating_matrix(weight)
        q, scale_R1 = round_to_steps(weight, LIMIT, weight.shape[1], scale_dtype)
        return Matrix(q.to(torch.int8), scale_R1[:, 0].contiguous(), self)

    def dequantize(self, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        assert matrix.scale is not None
        # products in at least fp32: an 8-bit number times a scale is not representable in 16 bits
        wide = torch.promote_types(dtype, torch.float32)
        return (matrix.values.to(wide) * matrix.scale.to(wide).unsqueeze(1)).to(dtype)

    def error_bound(self, matrix: Matrix) -> Tensor:
        assert matrix.scale is not None
        return half_a_step(matrix.scale.float().unsqueeze(1), LIMIT, matrix.scale.dtype).expand(matrix.shape)


INT8 = register_format(Int8())
