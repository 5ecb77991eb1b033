"""Rounding to 8 and 4 bits with the least error on given inputs.

In: a matrix whose rows are multiplied by the components of an input, and the second moment of that input. Out: the matrix as
``rana_fx/formats.py`` stores it. In 4 bits, rows are rounded one after the other, those of most energy first, and the error of
each is compensated in the rows not rounded yet (optimal brain quantisation in a fixed order: GPTQ, arXiv 2210.17323). Each
group's step is the best of a few, of either sign: integers range from -8 to 7, and a step of the sign opposite to the group's
largest number represents that number by -8. In 8 bits rounding to nearest is as good.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.formats import pack, unpack

GROUP = 64
# the largest number of a group over eight steps: below 1 it is clipped, above 7/8 numbers of the other sign are not
_CLIPS = (1.12, 1.06, 1.0, 0.94, 0.88, 0.82, 0.76)
_LOWEST, _HIGHEST = -8, 7
_DAMP = 0.01  # of the mean energy of an input
_BLOCK = 128
COLUMNS = 2**15  # rounded at a time; a multiple of GROUP: columns are independent, and a vocabulary has 50,000 to 260,000


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in 8 or 4 bits: ``matrix`` and ``scale`` as stored, rows by components of the input."""

    matrix: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """fp32."""
        return unpack(self.matrix, self.scale)

    def rows(self, count: int) -> Packed:
        """The first rows."""
        return Packed(self.matrix[:count].contiguous(), self.scale[:count].contiguous())

    def columns(self, count: int) -> Packed:
        """The first columns; in 4 bits an even number, and more than a group: the group's length is inferred from them."""
        if self.matrix.dtype == torch.int8:
            return Packed(self.matrix[:, :count].contiguous(), self.scale)
        return Packed(self.matrix[:, : count // 2].contiguous(), self.scale[:, : -(-count // GROUP)].contiguous())


def quantize(matrix_KN: Tensor, bits: int, moment_KK: Tensor | None = None) -> Packed:
    """The matrix in 8 or 4 bits; N is even for 4. ``moment_KK``: of the input, for error feedback; None: round to nearest."""
    if bits == 8:
        return Packed(*pack(matrix_KN, 8, scale_dtype=torch.bfloat16))
    if moment_KK is None:
        return _beside([_packed(*_to_grid(part.float()), part.shape[1]) for part in matrix_KN.split(COLUMNS, dim=1)])
    order_K = moment_KK.diagonal().argsort(descending=True, stable=True)
    inverse_KK = _inverse_factor(moment_KK[order_K][:, order_K]).float()
    return _beside([_with_feedback(part, order_K, inverse_KK) for part in matrix_KN.split(COLUMNS, dim=1)])


def _beside(parts: list[Packed]) -> Packed:
    if len(parts) == 1:
        return parts[0]
    return Packed(torch.cat([part.matrix for part in parts], 1), torch.cat([part.scale for part in parts], 1))


def _with_feedback(matrix_KN: Tensor, order_K: Tensor, inverse_KK: Tensor) -> Packed:
    """In 4 bits: rows in this order, the error of each compensated in those after it."""
    work_KN = matrix_KN.float()[order_K]
    integers, scales = [], []
    rows, columns = work_KN.shape
    for start in range(0, rows, _BLOCK):
        stop = min(start + _BLOCK, rows)
        # error feedback inside a block changes its steps little: one search serves all of its rows
        steps = _to_grid(work_KN[start:stop])[1]
        steps_BN = steps.float().repeat_interleave(GROUP, 1)[:, :columns]
        safe_BN = torch.where(steps_BN != 0, steps_BN, 1)
        chosen_BN, errors_BN = torch.zeros_like(steps_BN), torch.zeros_like(steps_BN)
        for index, row in enumerate(range(start, stop)):
            integer = (work_KN[row] / safe_BN[index]).round_().clamp_(_LOWEST, _HIGHEST)
            error = (work_KN[row] - integer * steps_BN[index]) / inverse_KK[row, row]
            work_KN[row + 1 : stop].addr_(inverse_KK[row, row + 1 : stop], error, alpha=-1)
            chosen_BN[index], errors_BN[index] = integer, error
        work_KN[stop:] -= inverse_KK[start:stop, stop:].t() @ errors_BN
        integers.append(torch.nn.functional.pad(chosen_BN, (0, -columns % GROUP)))
        scales.append(steps)
    back_K = order_K.argsort()
    return _packed(torch.cat(integers)[back_K], torch.cat(scales)[back_K], columns)


def _inverse_factor(moment_KK: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped moment's inverse, fp64."""
    moment = moment_KK.double()
    size = moment.diagonal().mean().clamp_min(1e-30)
    damped = moment + _DAMP * size * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor


def _to_grid(rows_RN: Tensor) -> tuple[Tensor, Tensor]:
    """(integers (R, G, GROUP), steps (R, G) in bfloat16): of a few steps per group, the one with the least squared error."""
    padded = torch.nn.functional.pad(rows_RN, (0, -rows_RN.shape[1] % GROUP)).reshape(len(rows_RN), -1, GROUP)
    low, high = padded.aminmax(dim=-1)
    extreme = torch.where(low.abs() > high, low, high)
    chosen, least, steps = torch.zeros_like(padded), torch.full_like(extreme, torch.inf), torch.zeros_like(extreme).bfloat16()
    for clip in _CLIPS:
        tried = (extreme * (clip / _LOWEST)).to(torch.bfloat16)
        step = torch.where(tried != 0, tried, 1).float().unsqueeze(-1)
        integers = (padded / step).round_().clamp_(_LOWEST, _HIGHEST)
        error = (integers * step - padded).square_().sum(-1)
        better = error < least
        least, steps = torch.where(better, error, least), torch.where(better, tried, steps)
        chosen = torch.where(better.unsqueeze(-1), integers, chosen)
    return chosen, steps


def _packed(integers: Tensor, steps: Tensor, columns: int) -> Packed:
    nibbles = (integers.reshape(len(integers), -1)[:, :columns] + 8).to(torch.uint8)
    return Packed(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), steps.contiguous())
