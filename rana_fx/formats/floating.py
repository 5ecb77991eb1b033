"""Numbers as they are: fp64, fp32, bf16 or fp16, without a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.errors import BadOperand
from rana_fx.formats.base import Format, Matrix, floating_matrix, register_format


class Floating(Format):
    """values (R, C) in a floating dtype of 16 bits or more, no scale:   w = values."""

    name = "floating"
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    expects = "floating"
    plain = True

    def bits(self, dtype: torch.dtype) -> int:
        return 8 * dtype.itemsize

    def check(self, matrix: Matrix) -> None:
        if matrix.scale is not None:
            got = str(tuple(matrix.scale.shape))
            raise BadOperand(name="scale", got=got, expected="None for a floating weight", todo="Leave it out.")

    def pack(self, weight: Tensor, *, scale_dtype: torch.dtype = torch.float32) -> Matrix:  # noqa: ARG002
        floating_matrix(weight)
        return Matrix(weight, None, self)

    def dequantize(self, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        return matrix.values.to(dtype)

    def error_bound(self, matrix: Matrix) -> Tensor:
        return torch.zeros(matrix.shape, device=matrix.values.device)


FLOATING = register_format(Floating())
