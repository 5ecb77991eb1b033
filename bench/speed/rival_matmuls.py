"""4-bit matmuls of other libraries: a weight is rounded to nearest in groups of 64 inputs and packed as their kernels read it.

In: a weight (N, K) in bf16 on a GPU. Out: a module or a ``RivalMatmul``: the call, and the weight that its kernel multiplies by,
for a comparison with fp64. Packages are imported when used.

    int4      tinygemm, which torch contains: ``aten::_weight_int4pack_mm``
    gemlite   gemlite's Triton kernels, which measure configs at the first call of each shape and number of tokens
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GROUP = 64
_LEVELS = 15
_MIDDLE = 8  # tinygemm's codes are relative to this one
_INNER_K_TILES = 8
# gemlite's kernel for up to four tokens adds parts of at least 16 inputs to the output atomically, in bf16
_ATOMIC_INPUTS, _ATOMIC_TOKENS = 16, 4
# its kernel for more tokens has at most so many parts
_SPLITS = 8


class RivalMatmul(NamedTuple):
    """``call``: x (T, K) -> (T, N). ``weight``: (N, K), as the kernel rounds it. ``stored``: bytes of the packed weight.

    ``roundings``: roundings of an output to bf16, as the RMS of their sum over one rounding's.
    """

    call: Callable[[Tensor], Tensor]
    weight: Tensor
    stored: int
    roundings: int


class Codes(NamedTuple):
    """A weight in 4 bits: (N, K) codes 0 to 15; (N, K / 64) scale in bf16 and value of code 0 in fp32."""

    codes: Tensor
    scale: Tensor
    low: Tensor


def rounded(weight_NK: Tensor) -> Codes:
    """Round to nearest; the 16 levels of a group span its values."""
    groups = weight_NK.detach().float().unflatten(1, (-1, GROUP))
    low = groups.amin(-1)
    # of a group of equal values: any scale
    scale = ((groups.amax(-1) - low) / _LEVELS).clamp(min=1e-6).bfloat16()
    codes = ((groups - low[..., None]) / scale.float()[..., None]).round().clamp(0, _LEVELS)
    return Codes(codes.flatten(1).to(torch.uint8), scale, low)


def multiplied(codes_NK: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """codes * scale + offset of each group, (N, K), with one rounding to bf16, as both kernels compute it."""
    groups = codes_NK.double().unflatten(1, (-1, GROUP))
    return (groups * scale.double()[..., None] + offset.double()[..., None]).flatten(1).bfloat16()


def tinygemm_operands(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K), scales and zeros (K / 64, N, 2) in bf16, and the weight that they stand for, (N, K)."""
    codes, scale, low = rounded(weight_NK)
    middle = (low + _MIDDLE * scale.float()).bfloat16()
    weight = multiplied(codes.to(torch.int8) - _MIDDLE, scale, middle)
    return codes, torch.stack([scale, middle], -1).transpose(0, 1).contiguous(), weight


def tinygemm(weight_NK: Tensor, tokens: int) -> RivalMatmul:
    """The matmul of torchao's int4 weight-only models. It adds in fp32."""
    codes, scales_and_zeros, weight = tinygemm_operands(weight_NK)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_K_TILES)

    def call(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales_and_zeros)

    return RivalMatmul(call, weight, packed.nbytes + scales_and_zeros.nbytes, 1)


class GemliteLinear(nn.Module):
    """What gemlite packed, in buffers, and its custom operation, which Dynamo traces as one node."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        tensors = zip(("packed", "scales", "zeros", "meta_scale"), layer.get_tensor_args(), strict=True)
        for name, tensor in (*tensors, ("bias", layer.bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self.settings: list[int] = layer.get_meta_args()

    def forward(self, x: Tensor) -> Tensor:
        tensors = [self.packed, self.scales, self.zeros, self.meta_scale]
        return torch.ops.gemlite.forward_functional(x, self.bias, tensors, self.settings)


def gemlite_layer(weight_NK: Tensor, bias: Tensor | None = None) -> GemliteLinear:
    """The linear, by gemlite's A16W4 in HQQ's format: codes * scale + zeros. Imports gemlite, which needs a GPU."""
    from gemlite.helper import A16W4_HQQ_INT

    codes, scale, low = rounded(weight_NK)
    make = A16W4_HQQ_INT(device=str(weight_NK.device), dtype=weight_NK.dtype)
    return GemliteLinear(make.from_weights(codes, scale, -low / scale.float(), bias))


def gemlite(weight_NK: Tensor, tokens: int) -> RivalMatmul:
    """gemlite's kernel for that number of tokens."""
    layer = gemlite_layer(weight_NK)
    weight = multiplied(rounded(weight_NK).codes, layer.scales.t(), layer.zeros.t())
    parts = weight_NK.shape[1] / _ATOMIC_INPUTS if tokens <= _ATOMIC_TOKENS else _SPLITS
    stored = layer.packed.nbytes + layer.scales.nbytes + layer.zeros.nbytes
    # the mean square of partial sums of random terms is half of that of the sum; each part is rounded before it is added
    return RivalMatmul(layer, weight, stored, 1 + ceil((parts / 2) ** 0.5))


MATMULS: dict[str, Callable[[Tensor, int], RivalMatmul]] = {"int4": tinygemm, "gemlite": gemlite}
