"""Launch configs of the masked GEMV on tensor cores, and the shared memory they need."""

from __future__ import annotations

import dataclasses

from rana_fx.errors import InvalidOption
from rana_fx.kernels.triton.config import H200_SM_COUNT, cdiv

STEP = 16  # ranks of one product
ROW_BYTES = 128  # of a rank's row that a warp reads
MOST_SHARED_BYTES = 227 * 1024
# Of such blocks a multiprocessor runs one. A launch that begins while the previous one ends finds free space on some
# multiprocessors only, and without this its blocks share those while others have none.
ALONE_BYTES = 116 * 1024
MOST_INTEGER_TOKENS = 2
MULTIPROCESSORS_BESIDE = 16  # on which the blocks of a cluster are, at least
THREADS_AT_A_TIME = 512  # on a multiprocessor, with 128 registers; above 8 tokens a thread takes up to 255
MOST_LISTED = 64  # values of a thread, in 16 bits: more take registers, and seconds to compile
MOST_SPLITS = 8  # blocks of a cluster that every GPU of compute capability 9.0 takes


@dataclasses.dataclass(frozen=True)
class Config:
    """Choices of one launch.

    segments: warps beside each other, of 128 bytes of a row each; even with an activation. warps: that share the ranks of a
    segment. splits: blocks of a cluster, each with its own ranks. stages: steps of 16 ranks in a warp's ring of copies.
    """

    segments: int = 1
    warps: int = 4
    splits: int = 4
    stages: int = 4

    def __post_init__(self) -> None:
        for name, least, most in (("segments", 1, 16), ("warps", 1, 16), ("splits", 1, MOST_SPLITS), ("stages", 2, 8)):
            if not least <= getattr(self, name) <= most:
                raise InvalidOption(name=name, got=getattr(self, name), expected=f"{least} to {most}")

    def listed(self, ranks: int) -> int:
        """Ranks of one block, at most: whole steps, taken in turn."""
        return cdiv(cdiv(ranks, STEP), self.splits) * STEP

    def blocks(self, outputs: int, bits: int, *, gated: bool) -> int:
        """Blocks of the launch. outputs: columns of the result."""
        return cdiv(outputs, columns_of(bits) * (self.segments // 2 if gated else self.segments)) * self.splits

    def alone(self, blocks: int, sm_count: int) -> bool:
        """Whether each block has a multiprocessor of its own: clusters of more blocks do not all fit at once."""
        return 4 * blocks <= 3 * sm_count

    def listed_by_thread(self, ranks: int, tokens: int) -> int:
        """Values that a thread reads to list ranks, one after another in the code."""
        return cdiv(self.listed(ranks), self.threads()) * tokens

    def threads(self) -> int:
        return 32 * self.segments * self.warps

    def integers(self, ranks: int, tokens: int, bits: int, group: int, scale_bytes: int) -> bool:
        """Whether products are of integers: they take more shared memory, and may not halve the blocks that run at a time."""
        mine = self._bytes_of_integers(ranks, tokens, bits, group, scale_bytes)
        others = self._bytes_of_floats(ranks, tokens, bits, group, scale_bytes)
        least = max(min(_blocks_at_a_time(others), 2, THREADS_AT_A_TIME // self.threads()), 1)
        return bits < 16 and tokens <= MOST_INTEGER_TOKENS and _blocks_at_a_time(mine) >= least

    def shared_bytes(self, ranks: int, tokens: int, bits: int, group: int, scale_bytes: int) -> int:
        """Dynamic shared memory: layout.cuh asserts that it suffices."""
        if self.integers(ranks, tokens, bits, group, scale_bytes):
            return self._bytes_of_integers(ranks, tokens, bits, group, scale_bytes)
        return self._bytes_of_floats(ranks, tokens, bits, group, scale_bytes)

    def _bytes_of_floats(self, ranks: int, tokens: int, bits: int, group: int, scale_bytes: int) -> int:
        length, warps = self.listed(ranks) + STEP, self.segments * self.warps
        groups = columns_of(4) // group if bits == 4 else 0
        rows = tokens + (bits == 8)  # 8 bits, fp16: powers of two behind the values
        lists = _whole(_whole(_whole(length * 4) + (length + 8) * rows * 2) + warps * 4)
        operands = lists + warps * self.stages * STEP * (ROW_BYTES + groups * scale_bytes)
        return max(operands, lists + warps * min(tokens, 8) * columns_of(bits) * 4)

    def _bytes_of_integers(self, ranks: int, tokens: int, bits: int, group: int, scale_bytes: int) -> int:
        length, warps = self.listed(ranks) + STEP, self.segments * self.warps
        groups = columns_of(4) // group if bits == 4 else 0
        lists = _whole(_whole(length * 4) + length * tokens * (4 if bits == 8 else 2))
        lists = _whole(_whole(lists + warps * 4 * (1 + tokens)) + self.segments * length * groups * scale_bytes)
        operands = _whole(lists + warps * tokens * groups * STEP * 4) + warps * self.stages * STEP * ROW_BYTES
        return max(operands, lists + warps * tokens * columns_of(bits) * 16)


def columns_of(bits: int) -> int:
    """Outputs of a segment."""
    return ROW_BYTES * 8 // bits


def default_config(K: int, N: int, T: int = 1, *, bits: int = 4, gated: bool = False) -> Config:
    """A config without measuring, by rules that the fastest configs of sweeps on an H200 have in common, at 0 to 70 % masked.

    Narrow results (4096 columns) have too few segments for all multiprocessors: clusters of 6 or 8 blocks. Wide ones take blocks
    of two or four segments, which read longer pieces of a row, in one or two waves. Above 2 tokens, whose products are of floats,
    a short ring of copies leaves room for sums. For weights in 16 bits: ``_of_bytes``. Clusters have fewer blocks where not all
    would run at once, or, of narrow results and one token, where not each block would have a multiprocessor of its own.
    """
    across = cdiv(N, columns_of(bits))
    if bits == 16:
        narrow = wide = _of_bytes(K, across, T)
    elif T <= 2:
        narrow = (1, 8, 6 if across <= 16 else 4, 3) if across <= 24 else (2, 4, 8, 3) if K >= 8192 else (1, 4, 8, 4)
        wide = (2, 4, 4, 4) if across <= 64 else (2, 4, 5, 4) if bits == 4 else (4, 2, 4, 4)
    else:
        narrow = (1, 8, 6, 3) if T <= 4 else (2, 4, 8, 3)
        wide = (2, 4, 4, 3 if T <= 8 else 4) if bits == 4 and (T <= 8 or across <= 64) else (4, 2, 5 if bits == 4 else 4, 3)
    segments, warps, splits, stages = narrow if across <= 40 else wide
    if gated and segments == 1:
        segments, warps = 2, warps // 2
    warps = max(min(warps, _most_threads(T) // 32 // segments), 1)
    splits = max(min(splits, cdiv(K, STEP)), 1)
    config = Config(segments, warps, splits, stages)
    if bits < 16:
        config = _in_one_wave(config, cdiv(across, segments), K, T, bits)
    # lists and sums of many tokens: shorter lists, a shorter ring of copies, fewer sums
    most_splits = min(MOST_SPLITS, cdiv(K, STEP))
    for field, least in (("splits", most_splits), ("stages", 2), *(("warps", n) for n in (8, 4, 2, 1))):
        if most_shared_bytes(config, K, T, bits) > MOST_SHARED_BYTES and (field == "splits" or getattr(config, field) > least):
            config = dataclasses.replace(config, **{field: least})
    return config


def _in_one_wave(config: Config, clusters: int, K: int, T: int, bits: int) -> Config:
    """The config with as many blocks in a cluster, but at least half, that all run at once on an H200; itself if none is so."""
    for splits in range(config.splits, config.splits // 2, -1):
        fewer = dataclasses.replace(config, splits=splits)
        at_a_time = min(_blocks_at_a_time(most_shared_bytes(fewer, K, T, bits)), max(_most_threads(T) // config.threads(), 1))
        # the blocks of a cluster are on multiprocessors that share a part of the GPU
        if clusters <= H200_SM_COUNT // MULTIPROCESSORS_BESIDE * (MULTIPROCESSORS_BESIDE * at_a_time // splits):
            return fewer
    return config


def _of_bytes(K: int, across: int, T: int) -> tuple[int, int, int, int]:
    """(segments, warps, splits, stages) of weights in 16 bits: nothing is unpacked, so that what counts are bytes in flight.

    Pieces of four segments are 512 bytes of a row. Clusters of 8 blocks have short lists and, of results up to 12288 columns, are
    three per multiprocessor or fewer; more columns take clusters of 4. One warp along the ranks copies far ahead; long lists, and
    wide results of few tokens, have two. Results too narrow for a block on most multiprocessors get narrower ones.
    """
    splits = 8 if across <= 192 else 4
    segments = next((n for n in (4, 2) if cdiv(across, n) * splits >= H200_SM_COUNT * 3 // 4), 1)
    two = T > 8 or K >= 8192 or (splits == 4 and T <= 2)
    warps, stages = (2, 4) if two else (1, 6)
    return segments, warps * 4 // segments, splits, stages


def configs(K: int, N: int, T: int = 1, *, bits: int = 4, gated: bool = False) -> list[Config]:
    """Configs to measure, the default first."""
    choices = [
        (2, 4, 8, 3),
        (2, 4, 4, 4),
        (2, 4, 5, 4),
        (4, 2, 4, 4),
        (4, 2, 4, 3),
        (4, 2, 5, 3),
        (1, 4, 8, 4),
        (1, 8, 6, 3),
        (1, 8, 4, 3),
        (1, 8, 8, 3),
        (2, 4, 6, 3),
    ]
    if bits == 16:
        choices = [(4, 1, 8, 6), (4, 2, 8, 4), (4, 2, 4, 4), (4, 1, 4, 6), (2, 4, 4, 4), (2, 2, 8, 6), (2, 4, 2, 4), (1, 8, 2, 4)]
    found = [default_config(K, N, T, bits=bits, gated=gated)]
    others = [Config(*choice) for choice in choices if not gated or choice[0] % 2 == 0]
    longest = max(found[0].listed_by_thread(K, T), MOST_LISTED)
    found += [config for config in others if bits < 16 or config.listed_by_thread(K, T) <= longest]
    found = [config for config in dict.fromkeys(found) if config.threads() <= _most_threads(T)]
    return [config for config in found if most_shared_bytes(config, K, T, bits) <= MOST_SHARED_BYTES]


def most_shared_bytes(config: Config, K: int, T: int, bits: int) -> int:
    """Shared memory with fp32 scales in groups of 64."""
    return config.shared_bytes(K, T, bits, 64, 4)


def _most_threads(T: int) -> int:
    """Of a block, so that registers suffice."""
    return THREADS_AT_A_TIME if T <= 8 else THREADS_AT_A_TIME // 2


def _blocks_at_a_time(shared_bytes: int) -> int:
    """On a multiprocessor, as far as shared memory goes: each block takes 1 KiB more than it uses."""
    return (MOST_SHARED_BYTES + 1024) // (shared_bytes + 1024)


def _whole(size: int) -> int:
    return cdiv(size, 128) * 128
