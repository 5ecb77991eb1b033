"""Masked matmuls of one token on a CPU against the bandwidth of its memory, for several numbers of threads.

In: shapes (inputs x outputs), bits of weights, a kept fraction. Out: JSONL rows and a table: GB/s of a triad a = b + 3 c over
arrays larger than the caches, counted as STREAM does (12 bytes for each fp32 element); for each matmul microseconds, GB/s of the
kept rows and scales, and their share of the triad. Weights rotate through ROTATION bytes, so that every call reads memory; the
calls of one rotation are one compiled graph. They lie in huge pages, as attached factors do. Results are compared with fp64.

    chrt -f 10 python -m bench.cpu_products --shapes 2048x11264 --bits 4,8,16 --out bench/results/cpu-products.jsonl
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.common.record import append, head, start
from bench.speed.decoding import percentiles
from bench.speed.timing import error_ratio
from rana_fx.commands.record import show
from rana_fx.errors import InvalidOption
from rana_fx.formats import pack, unpack
from rana_fx.kernels.ops import masked_gemv
from rana_fx.passes import lower
from rana_fx.runtime.huge_pages import in_huge_pages

ROTATION = 256e6  # bytes: several times the last-level cache of most processors
_REPEATS = 15


def main(
    shapes: Annotated[str, typer.Option(help="Matmuls, inputs x outputs, by commas.")] = "2048x11264",
    bits: Annotated[str, typer.Option(help="Bits of weights, by commas: 4, 8 or 16.")] = "4,8,16",
    density: Annotated[float, typer.Option(help="Kept fraction of the rows.")] = 0.5,
    threads: Annotated[str, typer.Option(help="Numbers of threads, by commas.")] = "1,2",
    rotation: Annotated[float, typer.Option(help="Bytes that the weights of one matmul and the triad's arrays take.")] = ROTATION,
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")] = Path("cpu-products.jsonl"),
) -> None:
    """Time matmuls and a triad."""
    if not 0 < density <= 1:
        raise InvalidOption(name="--density", got=density, expected="a number in (0, 1]")
    lower.register()
    torch._inductor.config.fx_graph_cache = False  # its key has no sources of templates
    start(out)
    lines = []
    for count in (int(word) for word in threads.split(",")):
        torch.set_num_threads(count)
        common = head("cpu_products") | {"density": density}
        bandwidth = triad(rotation)
        append(out, common | {"kind": "triad", "gb_per_s": bandwidth})
        for shape in shapes.split(","):
            inputs, outputs = (int(word) for word in shape.split("x"))
            for width in (int(word) for word in bits.split(",")):
                row = product(inputs, outputs, width, density, rotation)
                row["share"] = row["gb_per_s"] / bandwidth
                append(out, common | {"kind": "product", "inputs": inputs, "outputs": outputs, "bits": width, **row})
                lines.append(
                    (count, shape, width, row["us"]["p50"], row["gb_per_s"], bandwidth, row["share"], row["error_ratio"])
                )
    columns = ("threads", "inputs x outputs", "bits", "us", "GB/s", "triad GB/s", "share", "error over bound")
    show(f"masked matmuls of one token, {density:.0%} of the rows", columns, lines)


def triad(size: float) -> float:
    """GB/s of a = b + 3 c, three arrays of ``size`` bytes together, in compiled code."""
    b, c = (torch.ones(int(size) // 12) for _ in range(2))
    a = torch.empty_like(b)

    def step(a: Tensor, b: Tensor, c: Tensor) -> None:
        a.copy_(b + 3 * c)

    compiled = torch.compile(step)
    seconds = _timed(lambda: compiled(a, b, c))["p50"] / 1e6
    return 3 * a.nbytes / seconds / 1e9


def product(inputs: int, outputs: int, bits: int, density: float, size: float) -> dict[str, Any]:
    """us, GB/s of kept rows, and the RMS error over its bound, of a masked matmul of one bf16 token."""
    generator = torch.Generator().manual_seed(inputs + bits)
    torch.compiler.reset()  # else code for another width counts as a recompilation
    weights = []
    while not weights or len(weights) * sum(part.nbytes for part in weights[0] if part is not None) < size:
        values = torch.randn(inputs, outputs, generator=generator) / math.sqrt(inputs)
        weights.append((values.bfloat16(), None) if bits == 16 else pack(values, bits))
    weights = _as_attached(weights)
    v = torch.randn(1, inputs, generator=generator).bfloat16()
    tau = torch.where(torch.rand(inputs, generator=generator) < density, 0.0, math.inf)
    compiled = torch.compile(lambda v, tau, *given: [masked_gemv(v, tau, w, None, s) for w, s in given], dynamic=False)
    results = compiled(v, tau, *weights)
    kept = tau == 0
    values = unpack(*weights[0], torch.float64) if bits != 16 else weights[0][0].double()
    wide = v.double() * kept
    error = error_ratio(results[0], wide @ values, wide.abs() @ values.abs(), inputs)
    us = {name: value / len(weights) for name, value in _timed(lambda: compiled(v, tau, *weights)).items()}
    row_bytes = sum(part.nbytes for part in weights[0] if part is not None) / inputs
    return {
        "us": us,
        "kept": int(kept.sum()),
        "gb_per_s": row_bytes * int(kept.sum()) / us["p50"] / 1e3,
        "error_ratio": error,
    }


def _as_attached(weights: list[tuple[Tensor, Tensor | None]]) -> list[tuple[Tensor, Tensor | None]]:
    """The weights where attached factors lie: in huge pages, if the system has them."""
    parts = {(i, j): part for i, pair in enumerate(weights) for j, part in enumerate(pair) if part is not None}
    parts |= in_huge_pages(parts)
    return [(parts[i, 0], parts.get((i, 1))) for i in range(len(weights))]


def _timed(call: Callable[[], object]) -> dict[str, float]:
    """Percentiles of microseconds of a call."""
    took = []
    for _ in range(_REPEATS + 3):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1e6)
    return percentiles(took[3:])


if __name__ == "__main__":
    typer.run(main)
