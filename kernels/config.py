"""How a kernel is launched: a config, the few worth trying, and the one to take without trying.

``splits`` is no tuning knob: the partials' shape, and so what Inductor plans around the kernel, depends on it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor

from rana_fx.errors import InvalidOption

MAX_TOKENS = 16
H200_SM_COUNT = 132


class Lists(NamedTuple):
    """Active ranks by blocks, as the router's launch leaves them: ranks (blocks, BR) int32 in rising order, of which the first
    counts (blocks,) int32 are meant.
    """

    ranks: Tensor
    counts: Tensor


@dataclasses.dataclass(frozen=True)
class Config:
    """Choices of one launch of the masked product.

    splits: programs that share one block of outputs, each with its own ranks. block_n: outputs of a program. block_m: rows in
    flight. group: ranks a slice takes in turn. source: how ranks are listed (gather.py), "scratch" or "registers".
    """

    splits: int
    block_n: int = 256
    block_m: int = 16
    warps: int = 4
    stages: int = 2
    group: int = 16
    source: str = "scratch"

    def __post_init__(self) -> None:
        for name in ("block_n", "block_m", "warps", "group"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise InvalidOption(name=name, got=value, expected="a power of two")
        for name in ("splits", "stages"):
            if getattr(self, name) < 1:
                raise InvalidOption(name=name, got=getattr(self, name), expected="a positive number")

    def slice_ranks(self, ranks: int) -> int:
        """Ranks of one slice, at most: whole groups, taken in turn."""
        return cdiv(cdiv(ranks, self.group), self.splits) * self.group


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def default_config(
    K: int, N: int, T: int = 1, density: float = 0.5, sm_count: int = H200_SM_COUNT, *, bytes_per_weight: float = 2.0
) -> Config:
    """A config without measuring, by three rules.

    A row's stretch: 512 bytes, four lines of L2. Slices: the longest power of two up to 1024 ranks that still leaves two
    programs per SM, hence two to four of them where the shape allows; a slice below 64 would be all prologue. Rows in flight:
    16, fewer with more tokens or few active ranks in a slice, since each row holds T * BN sums.
    """
    block_n = min(max(_power_above(int(512 / bytes_per_weight)), 64), 512 if T == 1 else 256 if T <= 4 else 128, _power_above(N))
    slice_size = 1024
    while slice_size > 64 and cdiv(K, slice_size) * cdiv(N, block_n) < 2 * sm_count:
        slice_size //= 2
    splits = cdiv(K, slice_size)
    active = max(int(density * K / splits), 1)
    block_m = 16 if T > 4 else max(2, min(16 // _power_above(T), _power_above(active)))
    return Config(splits=splits, block_n=block_n, block_m=block_m, warps=4, stages=2)


def configs(K: int, N: int, T: int = 1, density: float = 0.5, sm_count: int = H200_SM_COUNT) -> list[Config]:
    """At most 16 configs that share the default's splits, hence its partials."""
    base = default_config(K, N, T, density, sm_count)
    return [
        dataclasses.replace(base, block_n=n, block_m=m, warps=w, stages=s)
        for n in sorted({base.block_n, max(base.block_n // 2, 16)})
        for m in sorted({base.block_m, max(base.block_m // 2, 1)})
        for w in (4, 8)
        for s in (1, 3)
    ]


def _power_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
