"""Launch configs of the router on tensor cores, and the shared memory they need."""

from __future__ import annotations

import dataclasses

from rana_fx.errors import InvalidOption
from rana_fx.kernels.cuda.config import MOST_SHARED_BYTES, MOST_SPLITS
from rana_fx.kernels.triton.config import H200_SM_COUNT, cdiv

ROWS = (8, 16, 32, 64)
MOST_PAIRED = 4  # tokens of blocks of 8 rows


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Choices of one launch.

    rows: of a block, 8 (up to 4 tokens), 16, 32 or 64. warps: of a block, which share the columns. splits: blocks of a cluster,
    which share them, too. held: registers of a thread for weights that are read ahead.
    """

    rows: int = 8
    warps: int = 4
    splits: int = 1
    held: int = 64

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise InvalidOption(name="rows", got=self.rows, expected=f"one of {', '.join(map(str, ROWS))}")
        for name, least, most in (("warps", 1, 16), ("splits", 1, MOST_SPLITS), ("held", 4, 128)):
            if not least <= getattr(self, name) <= most:
                raise InvalidOption(name=name, got=getattr(self, name), expected=f"{least} to {most}")

    def blocks(self, ranks: int) -> int:
        """Blocks of the launch."""
        return cdiv(ranks, self.rows) * self.splits

    def threads(self) -> int:
        return 32 * self.warps

    def units(self, columns: int, bits: int, group: int) -> int:
        """Of the columns of a block: a unit is what four lanes read at once. The last ones may have no columns."""
        of_turn = self.warps * self._beside()
        return cdiv(cdiv(cdiv(columns, unit_of(bits, group)), self.splits), of_turn) * of_turn

    def shared_bytes(self, columns: int, tokens: int, bits: int, group: int, *, scale_bytes: int, gain: bool, norm: bool) -> int:
        """Dynamic shared memory: router_layout.cuh asserts that it suffices."""
        units = self.units(columns, bits, group)
        chunks = units * unit_of(bits, group) // 8
        values = _whole(tokens * (chunks * 16 + (64 if chunks % 8 == 0 else 0)))
        gains = _whole(values + (chunks * 32 if gain else 0))
        scale_row = {4: (cdiv(units * scale_bytes, 16) | 1) * 16, 8: 4}.get(bits, 0)
        scales = _whole(gains + self.rows * scale_row)
        return (
            _whole(scales + (tokens * (self.warps + 1) * 4 if norm else 0)) + self.warps * self._beside() * tokens * self.rows * 4
        )

    def _beside(self) -> int:
        """Units that a warp multiplies at once, each by itself."""
        return 2 if self.rows == 8 else 1


def unit_of(bits: int, group: int) -> int:
    """Columns of a row that four lanes read at once: 8 bytes each where groups of 4 bits have 64 columns, else 16."""
    return (8 if bits == 4 and group == 64 else 16) * 4 * 8 // bits


def most_shared_bytes(config: RouterConfig, columns: int, tokens: int, bits: int) -> int:
    """Shared memory with a norm that has a gain, and fp32 scales in groups of either size."""
    groups = (64, 128) if bits == 4 else (columns,)
    given = [config.shared_bytes(columns, tokens, bits, group, scale_bytes=4, gain=True, norm=True) for group in groups]
    return max(given)


def default_config(R: int, D: int, T: int = 1, *, bits: int = 4, sm_count: int = H200_SM_COUNT) -> RouterConfig:
    """A config without measuring.

    The fastest of a sweep over 1952 and 2384 x 4096 on an H200. A block reads x of all its columns: one token takes blocks of 16
    rows, several take as many rows as make x the smaller part, and share columns over a cluster to be enough blocks.
    """
    if T == 1:
        rows, warps, splits = 16, 8 if bits == 4 else 16, 1
    elif bits == 16:
        rows, warps, splits = (8, 8, 1) if T <= MOST_PAIRED else (32, 8, 4)
    else:
        rows, warps, splits = 64, 8 if T <= MOST_PAIRED else 4, 4
    # fewer rows, of which as many multiprocessors have a block
    while rows > 16 and 2 * cdiv(R, rows) * splits < sm_count:
        rows //= 2
    units = max(D * bits // 8 // 256, 1)
    config = RouterConfig(rows, max(min(warps, units), 1), max(min(splits, units), 1))
    # x of many tokens: less columns for each block
    while most_shared_bytes(config, D, T, bits) > MOST_SHARED_BYTES and config.splits < MOST_SPLITS:
        config = dataclasses.replace(config, splits=config.splits + 1)
    return config


def configs(R: int, D: int, T: int = 1, *, bits: int = 4, sm_count: int = H200_SM_COUNT) -> list[RouterConfig]:
    """Configs to measure, the default first."""
    found = [default_config(R, D, T, bits=bits, sm_count=sm_count)]
    choices = {1: ((8, 4, 1), (8, 8, 1), (16, 4, 1), (16, 8, 1), (8, 2, 1), (8, 4, 2), (16, 8, 2), (16, 4, 2), (16, 16, 1))}
    several = ((16, 8, 1), (32, 8, 1), (32, 8, 2), (32, 4, 2), (32, 8, 4), (64, 8, 2), (64, 8, 4), (64, 4, 4))
    found += [RouterConfig(*choice) for choice in choices.get(T, several)]
    return [one for one in dict.fromkeys(found) if most_shared_bytes(one, D, T, bits) <= MOST_SHARED_BYTES]


def _whole(size: int) -> int:
    return cdiv(size, 128) * 128
