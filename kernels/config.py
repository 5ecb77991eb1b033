"""How a kernel is launched: a config, the few worth trying, and the one to take without trying.

``splits`` is no tuning knob: the partials' shape, and so what Inductor plans around the kernel, depends on it.
"""

from __future__ import annotations

import dataclasses

from rana_fx.errors import InvalidOption

MAX_TOKENS = 16
TOKENS_AT_ONCE = 4
H200_SM_COUNT = 132
# what one warp reads of a row with 16 bytes per thread
WARP_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Config:
    """Choices of one launch of the masked product.

    splits: programs that share one block of outputs, each with its own ranks. block_n: outputs of a program. block_m: rows in
    flight per stage. stages: 1 holds rows in registers, more prefetch them to shared memory. group: ranks a slice takes in
    turn. early: ranks of a slice that are read before their mask is known.
    """

    splits: int
    block_n: int = 512
    block_m: int = 4
    warps: int = 2
    stages: int = 4
    group: int = 16
    early: int = 0

    def __post_init__(self) -> None:
        for name in ("block_n", "block_m", "warps", "group"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise InvalidOption(name=name, got=value, expected="a power of two")
        if self.early < 0 or self.early & (self.early - 1):
            raise InvalidOption(name="early", got=self.early, expected="zero or a power of two")
        for name in ("splits", "stages"):
            if getattr(self, name) < 1:
                raise InvalidOption(name=name, got=getattr(self, name), expected="a positive number")

    def slice_ranks(self, ranks: int) -> int:
        """Ranks of one slice, at most: whole groups, taken in turn."""
        return cdiv(cdiv(ranks, self.group), self.splits) * self.group


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def row_warps_of(warps: int, block_n: int, bits: int) -> int:
    """Rows that the warps read at once, since one warp spans WARP_BYTES: parts of a row, a row, or several."""
    return max(warps * WARP_BYTES * 8 // (block_n * bits), 1)


def default_config(K: int, N: int, T: int = 1, density: float = 0.5, sm_count: int = H200_SM_COUNT, *, bits: int = 16) -> Config:
    """A config without measuring, by rules that the fastest 16-bit configs of a sweep on an H200 have in common.

    16 bits: two warps, each 512 bytes of a row, twelve warps per SM, all at once. Hence slices of about 128 ranks (4096 x 12288),
    of 256 (4096 x 22016), of 176 (11008 x 4096); never below 32, which would be all prologue. More slices than 64 cost more to
    add up than they gain. Four rows per stage and four stages, or fewer rows where hardly any are active.

    8 and 4 bits, not swept yet: four warps, in part along the rows, since partials weigh more beside shorter rows. A block of
    rows in 4 bits that several tokens share must stay small enough for registers.
    """
    warps, per_sm, block_m = (2, 12, 4) if bits >= 16 else (4, 8, 8)
    block_n = min(max(min(warps * WARP_BYTES * 8 // bits, 1024), 64), _power_above(N))
    columns, groups = cdiv(N, block_n), cdiv(K, 16)
    wanted = min(max(per_sm * sm_count // (warps * columns), 1), cdiv(groups, 2), 64)
    splits = cdiv(groups, cdiv(groups, wanted))
    active = max(int(density * K / splits), 1)
    if bits == 4 and T > 1:
        block_m //= 2
    return Config(splits=splits, block_n=block_n, block_m=min(block_m, _power_above(active)), warps=warps, stages=4)


def configs(K: int, N: int, T: int = 1, density: float = 0.5, sm_count: int = H200_SM_COUNT, *, bits: int = 16) -> list[Config]:
    """At most 16 configs that share the default's splits, hence its partials."""
    base = default_config(K, N, T, density, sm_count, bits=bits)
    found = [
        dataclasses.replace(base, block_n=n, block_m=m, warps=w, stages=s, early=e)
        for n, w in ((base.block_n, base.warps), (max(base.block_n // 2, 16), max(base.warps // 2, 1)), (base.block_n, 4))
        for m, s in ((base.block_m, 4), (base.block_m * 2, 1))
        for e in (0, 8)
    ]
    return list(dict.fromkeys(found))


def _power_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
