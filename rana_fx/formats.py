"""Weights in 8 and 4 bits: symmetric, round to nearest; what the stored numbers mean, exactly.

    int8:  weight_RC int8,            scale_R   one per row                     w = q * scale,  |q| <= 127
    int4:  weight uint8 (R, C / 2),   scale_RG  one per row and group of columns  w = (nibble - 8) * scale
           byte j of a row holds column 2j in its low and 2j + 1 in its high half; the last group may be shorter
           ``pack`` leaves -8 out; others may use it, and scales of either sign (rana_fx/recipes/rana/gptq.py)

Storage is told by dtype alone: floating, int8, uint8. The group length (64 or 128) follows from the shapes. Rounding takes
place against the scale as it is stored, so ``unpack`` is the weight and kernels are compared with it, not with the original.
Error of ``pack``: half a step, |w - unpack| <= scale / 2 (and what rounding the scale to bfloat16 clips: 0.4 % of its range).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.errors import BadOperand, InvalidOption, NonFinite

GROUPS = (64, 128)


def bits_of(weight: Tensor) -> int:
    """4, 8, or the width of a floating dtype. Raises BadOperand."""
    if weight.is_floating_point():
        return weight.dtype.itemsize * 8
    if weight.dtype in (torch.int8, torch.uint8):
        return 8 if weight.dtype == torch.int8 else 4
    expected = "floating, torch.int8 (8 bits) or torch.uint8 (packed 4 bits)"
    raise BadOperand(name="weight", got=str(weight.dtype), expected=expected, todo="Pack it with quantize.pack.")


def shape_of(weight: Tensor, scale: Tensor | None) -> tuple[int, int]:
    """(rows, columns) of the matrix that is stored. Raises BadOperand where weight and scale do not belong together."""
    bits = bits_of(weight)
    if weight.dim() != 2:
        raise BadOperand(name="weight", got=_shape(weight), expected="two dimensions", todo="Pass one matrix.")
    rows, columns = weight.shape[0], weight.shape[1] * (2 if bits == 4 else 1)
    got = "None" if scale is None else _shape(scale)
    if bits > 8:
        if scale is not None:
            raise BadOperand(name="scale", got=got, expected="None for a floating weight", todo="Leave it out.")
    elif bits == 8:
        if scale is None or tuple(scale.shape) != (rows,):
            raise BadOperand(
                name="scale", got=got, expected=f"({rows},) for an int8 weight", todo="Pass what quantize.pack gave."
            )
    elif scale is None or scale.dim() != 2 or scale.shape[0] != rows or not _fitting(columns, scale.shape[1]):
        expected = " or ".join(f"{(rows, _groups(columns, group))}" for group in GROUPS)
        raise BadOperand(name="scale", got=got, expected=f"{expected} for 4 bits", todo="Pass what quantize.pack gave.")
    return rows, columns


def group_of(weight: Tensor, scale: Tensor) -> int:
    """Columns that share one scale of a 4-bit weight. With one group in all, both lengths mean the same."""
    return _fitting(weight.shape[1] * 2, scale.shape[1])[0]


def gated_unit(weight: Tensor, scale: Tensor | None) -> int:
    """What columns must be a multiple of, for each half of them to be whole words and groups."""
    return 2 if scale is None else 2 * (group_of(weight, scale) if weight.dtype == torch.uint8 else 4)


def pack(weight: Tensor, bits: int, group: int = 64, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Round a floating matrix to 8 bits per row or 4 bits per group.

    Args:
        weight: (R, C), finite; C even for 4 bits.
        bits: 8 or 4.
        group: 64 or 128 columns per scale, for 4 bits.
        scale_dtype: what scales are stored in; bfloat16 saves 16 bits per group.

    Returns:
        (weight, scale) as the module docstring describes them, contiguous.

    Raises:
        BadOperand, InvalidOption, NonFinite.
    """
    if bits not in (4, 8):
        raise InvalidOption(name="bits", got=bits, expected="8 or 4")
    if group not in GROUPS:
        raise InvalidOption(name="group", got=group, expected="64 or 128")
    if not weight.is_floating_point() or weight.dim() != 2:
        got = f"{_shape(weight)} {weight.dtype}"
        raise BadOperand(name="weight", got=got, expected="a floating matrix", todo="Pass the weight before packing.")
    if bits == 4 and weight.shape[1] % 2:
        raise BadOperand(
            name="weight",
            got=_shape(weight),
            expected="an even number of columns",
            todo="Append a column of zeros, or use 8 bits.",
        )
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise NonFinite(site="quantize.pack", count=bad, what="weight", shape=_shape(weight))
    rows, columns = weight.shape
    limit, length = (127, columns) if bits == 8 else (7, group)
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % length)).reshape(rows, -1, length)
    scale_RG = (padded.abs().amax(-1) / limit).to(scale_dtype)
    # an all-zero group, or one whose step vanishes in scale_dtype, is stored as zeros
    step = torch.where(scale_RG > 0, scale_RG, 1).float().unsqueeze(-1)
    q = (padded / step).round().clamp(-limit, limit).reshape(rows, -1)[:, :columns]
    if bits == 8:
        return q.to(torch.int8), scale_RG[:, 0].contiguous()
    nibbles = (q + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scale_RG


def unpack(weight: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that is stored, (R, C); a floating weight is only cast. Raises BadOperand."""
    rows, columns = shape_of(weight, scale)
    if scale is None:
        return weight.to(dtype)
    # products in at least fp32: an 8-bit number times a scale is not representable in 16 bits
    wide = torch.promote_types(dtype, torch.float32)
    if weight.dtype == torch.int8:
        return (weight.to(wide) * scale.to(wide).unsqueeze(1)).to(dtype)
    halves = torch.stack([weight & 0xF, weight >> 4], -1).reshape(rows, columns)
    steps = scale.to(wide).repeat_interleave(group_of(weight, scale), 1)[:, :columns]
    return ((halves.to(wide) - 8) * steps).to(dtype)


def _groups(columns: int, group: int) -> int:
    return -(-columns // group)


def _fitting(columns: int, count: int) -> list[int]:
    return [group for group in GROUPS if _groups(columns, group) == count]


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
