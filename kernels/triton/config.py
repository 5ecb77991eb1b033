"""Launch configs of the masked GEMV: the default by rule, and the few that autotuning measures (autotune.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import torch

from rana_fx.errors import BadOperand, InvalidOption

MAX_TOKENS = 16
# on a CPU: for more, masks of several tokens cover most rows and a matmul is faster
CPU_TOKENS = 8
TOKENS_AT_ONCE = 4
H200_SM_COUNT = 132
# blocks of outputs of one launch in a compiled graph, at most: as many counters as the graph's launches share
COUNTERS = 4096
# ranks that a slice takes in turn
GROUP = 16
MOST_PARTS = 3  # GEMVs in one launch: as many pointers as its kernel takes
# what one warp reads of a row with 16 bytes per thread
WARP_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Config:
    """Choices of one launch of the masked GEMV.

    splits: programs that share one block of outputs, each with its own ranks. block_n: outputs of a program. block_m: rows in
    flight per stage. stages: 1 holds rows in registers, more prefetch them to shared memory. early: ranks of a slice that are
    read before their mask is known.
    """

    splits: int
    block_n: int = 512
    block_m: int = 4
    warps: int = 2
    stages: int = 4
    early: int = 0

    def __post_init__(self) -> None:
        for name in ("block_n", "block_m", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise InvalidOption(name=name, got=value, expected="a power of two")
        if self.early < 0 or self.early & (self.early - 1):
            raise InvalidOption(name="early", got=self.early, expected="zero or a power of two")
        for name in ("splits", "stages"):
            if getattr(self, name) < 1:
                raise InvalidOption(name=name, got=getattr(self, name), expected="a positive number")

    def slice_ranks(self, ranks: int) -> int:
        """Ranks of one slice, at most: whole groups of GROUP, taken in turn."""
        return cdiv(cdiv(ranks, GROUP), self.splits) * GROUP


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    traced: leave the launch in the graph that is being traced, for Inductor to generate (torch.library.wrap_triton). pdl: start
    before the previous kernel of the stream is done (programmatic dependent launch, compute capability 9.0): what a kernel reads
    before it waits, no kernel just before may have written.
    """

    traced: bool = False
    pdl: bool = False

    def kernel(self, kernel: Any) -> Any:
        return torch.library.wrap_triton(kernel) if self.traced else kernel

    def on(self, x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
        """The device to launch on."""
        return contextlib.nullcontext() if self.traced else torch.cuda.device_of(x)

    @property
    def options(self) -> dict[str, bool]:
        """``PDL`` of the kernel, and the compiler's option; to a traced launch Inductor's code adds that (passes/launch.py)."""
        return {"PDL": self.pdl} | ({"launch_pdl": True} if self.pdl and not self.traced else {})


EAGER = Launch()


def check_token_count(name: str, x: torch.Tensor) -> int:
    """The rows of an operand. Raises BadOperand for more than a launch takes, or none."""
    tokens = math.prod(x.shape[:-1])
    if not 1 <= tokens <= MAX_TOKENS:
        raise BadOperand(name=name, got=f"{tokens} tokens", expected=f"1 to {MAX_TOKENS}", todo="Use the reference for more.")
    return tokens


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def row_warps_of(warps: int, block_n: int, bits: int) -> int:
    """Rows that the warps read at once, since one warp spans WARP_BYTES: parts of a row, a row, or several."""
    return max(warps * WARP_BYTES * 8 // (block_n * bits), 1)


def default_config(K: int, N: int, T: int = 1, density: float = 0.5, sm_count: int = H200_SM_COUNT, *, bits: int = 16) -> Config:
    """A config without measuring, by rules that the fastest configs of sweeps on an H200 have in common.

    The last program to arrive adds the partials, and reads 16 or so at once: few slices, as many as it takes to give an SM four
    to six warps. Wide results take blocks of 1024 (4096 x 22016) or 512 outputs (4096 x 12288), narrow ones 256 or 128 with one
    warp (11008 x 4096, 4096 x 4096), whose programs do not wait for each other inside; rows of 8 bits are half as long, so wide
    blocks have half the warps. One slice, so that nothing is handed over, takes half as long again: programs are then few and
    uneven. Reading 16 rows early is faster where a slice keeps more than a few of them and has few outputs.

    4 bits, which take more time to dequantize than to read: 128 outputs, a block of 32 rows in the registers of four warps.
    """
    if bits >= 16:
        # several tokens hold as many sums in registers
        wide = (1024, 4, 1.35) if N >= 16384 and T == 1 else (512, 2, 3)
        block_n, warps, per_sm = wide if N >= 8192 else (256, 1, 6) if K >= 8192 else (128, 1, 6)
        block_m = 8 if block_n != 256 and T == 1 else 4
    elif bits == 8:
        middle = (256, 2, 6, 16) if N >= 8192 else (128, 1, 6, 16)
        block_n, warps, per_sm, block_m = (1024, 2, 4, 4) if N >= 16384 else middle
    else:
        block_n, warps, per_sm, block_m = 128, 4, 6.5, 32
    block_n = min(block_n, max(power_above(N), 64))
    splits = _splits(K, N, block_n, int(per_sm * sm_count), most=64)
    kept = density * K / splits
    early = 16 if bits >= 16 and T == 1 and block_n == 256 and kept >= 40 else 0
    if bits < 16 and T > 1:
        block_m = max(block_m // 2, 4)
    stages = 1 if bits == 4 else 3 if bits == 8 and block_m >= 16 else 4
    return Config(splits, block_n, min(block_m, power_above(max(int(kept), 1))), warps, stages=stages, early=early)


def configs(K: int, N: int, T: int = 1, density: float = 0.5, sm_count: int = H200_SM_COUNT, *, bits: int = 16) -> list[Config]:
    """At most 16 to measure, the default first."""
    base = default_config(K, N, T, density, sm_count, bits=bits)

    def with_programs(block_n: int, warps: int, per_sm: float) -> Config:
        splits = _splits(K, N, block_n, int(per_sm * sm_count), most=96)
        return dataclasses.replace(base, block_n=block_n, warps=warps, splits=splits)

    # outputs, warps, programs for each multiprocessor
    known: dict[int, tuple[tuple[int, int, float], ...]] = {
        16: ((1024, 4, 1.35), (512, 2, 2), (512, 2, 3), (256, 1, 6), (128, 1, 4), (128, 1, 6)),
        8: ((1024, 2, 4), (2048, 4, 4), (256, 2, 3), (256, 2, 6), (128, 1, 6)),
        4: ((128, 4, 4), (256, 4, 4), (256, 2, 3), (256, 2, 6), (128, 2, 6)),
    }
    shapes = [base, *(with_programs(*choice) for choice in known[min(bits, 16)] if choice[0] <= 2 * N)]
    found = [
        dataclasses.replace(shape, early=early, block_m=block_m, stages=stages)
        for early in dict.fromkeys((base.early, 16 if T == 1 and bits >= 16 else 0))
        for block_m, stages in ((base.block_m, base.stages), (8, 3) if bits >= 16 else (16, 3))
        for shape in shapes
    ]
    return list(dict.fromkeys([base, *found]))[:16]


def _splits(K: int, N: int, block_n: int, programs: int, *, most: int) -> int:
    """Slices of whole groups of ranks, none empty and none below two groups, that make about so many programs."""
    groups = cdiv(K, GROUP)
    wanted = min(max(programs // cdiv(N, block_n), 1), cdiv(groups, 2), most)
    return cdiv(groups, cdiv(groups, wanted))


def power_above(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
