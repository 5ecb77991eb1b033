"""Time of every kernel against the fastest dense matmul, the published kind of kernel, and the copy bandwidth.

In: a GPU; operands are random. Out: one JSONL row per operation, shape, masked fraction, number of tokens, storage and
implementation, and a table: microseconds (p20, p50, p80), GB/s of the weight bytes it needs and their ratio to the bandwidth of a
large copy, error over its bound, whether two runs are bit-identical, speed-up over the fastest dense matmul, whether the cost
model prefers it. Every result is compared with fp64 first; a wrong result has no speed-up.

The time of this package's kernels is the complete launch from v to y. The router of a rank adapter has its own rows, also with
the norm in front ("+norm", with the default config).

With ``--tune`` kernels run with other configs, too: a row is of the fastest, ``tried`` of all, the default first. A second table
orders the configs of a matmul and number of tokens by their time over that of the fastest, at worst over masked fractions.

4-bit matmuls of others (int4, gemlite; ``bench.speed.rival_matmuls``) are dense, and compared with fp64 of their own weight.
``rival_us`` is the fastest correct one of a matmul, ``over_rival`` the speed-up over it, of this package's kernels in 4 bits. A
rival without its package, or without a kernel for a shape, is left out with its reason on stderr.

    python -m bench.speed.kernels --out bench/results/kernels-h200.jsonl
    python -m bench.speed.kernels --shapes llama-2-7b/qkv --masked 50 --tokens 1 --bits 16 --tune masked,tensor_cores
    python -m bench.speed.kernels --shapes llama-2-7b/router:2384 --tokens 1,4 --tune router,tensor_cores --out routers.jsonl
    python -m bench.speed.kernels --bits 4 --tokens 1,4,16 --rivals cublas,inductor,int4,gemlite
    python -m bench.speed.kernels --interpret                       # toy sizes without a GPU: correctness only
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.common.record import append, head, start
from bench.speed.rival_matmuls import MATMULS
from bench.speed.shapes import Shape, shapes
from bench.speed.timing import Call, Times, buffer_count, copy_gbps, error_ratio, timed
from bench.speed.tried_configs import configs_table
from rana_fx.commands.record import show
from rana_fx.errors import InvalidOption, RanaError
from rana_fx.kernels.cost import masked_us, prefers_masked, router_us, tensor_core_us, triton_router_us

# us of the fastest correct dense matmul, by shape and tokens
Fastest = dict[tuple[str, int], float]
BASELINES = ("cublas", "inductor", "published", "fallback")
# others' matmuls in 4 bits, on a GPU
RIVALS = tuple(MATMULS)
RIVAL_BITS = 4
# this package's, by the names of their rows; and what the cost model expects of them
KERNELS = ("masked", "tensor_cores", "router")
EXPECTED_US = {"masked": masked_us, "tensor_cores": tensor_core_us}
EXPECTED_OF_ROUTERS = {"router": triton_router_us, "tensor_cores": router_us}


def main(
    names: Annotated[str, typer.Option("--shapes", help="Models or matmuls, by commas.")] = "llama-2-7b",
    masked: Annotated[str, typer.Option(help="Per cent of ranks masked, by commas.")] = "0,30,50,70,90",
    tokens: Annotated[str, typer.Option(help="Tokens at once, by commas.")] = "1,2,4,8,16",
    bits: Annotated[str, typer.Option(help="Bits per weight, by commas: 16, 8, 4.")] = "16,8,4",
    baselines: Annotated[
        str,
        typer.Option(
            "--rivals", help="Baselines, by commas: some of cublas, inductor, published, fallback, and in 4 bits int4, gemlite."
        ),
    ] = ",".join(BASELINES),
    seconds: Annotated[float, typer.Option(help="Start no new matmul after this time.")] = 480.0,
    tune: Annotated[
        str, typer.Option(help="Kernels to time with other configs, too, by commas: some of masked, tensor_cores, router.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="JSONL file; overwritten.")] = None,
    interpret: Annotated[bool, typer.Option(help="Toy sizes under Triton's interpreter, without times.")] = False,
) -> None:
    """Time kernels against dense matmuls, the published kernel and the copy bandwidth."""
    if interpret and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads TRITON_INTERPRET on import, and is already imported
        command = [sys.executable, "-m", "bench.speed.kernels", *sys.argv[1:]]
        raise typer.Exit(subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode)
    try:
        run(names, masked, tokens, bits, baselines, seconds, tune, out, interpret)
    except RanaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def run(
    names: str, masked: str, tokens: str, bits: str, baselines: str, seconds: float, tune: str, out: Path | None, interpret: bool
) -> list[dict[str, Any]]:
    """Measure all cases, write their rows to ``out`` and return them. Raises InvalidOption, UnknownChoice."""
    shares, counts, widths = numbers("masked", masked, 0, 100), numbers("tokens", tokens, 1, 16), numbers("bits", bits, 4, 16)
    known = set(baselines.split(",")) - {""}
    if not known <= {*BASELINES, *RIVALS}:
        raise InvalidOption(name="rivals", got=baselines, expected=f"some of {', '.join((*BASELINES, *RIVALS))}")
    if not set(widths) <= {4, 8, 16}:
        raise InvalidOption(name="bits", got=bits, expected="some of 16, 8, 4")
    tuned = set(tune.split(",")) - {""}
    if not tuned <= set(KERNELS):
        raise InvalidOption(name="tune", got=tune, expected=f"some of {', '.join(KERNELS)}")
    if interpret:
        names, shares, counts, known = "toy", shares[:1], counts[:1], known - {"inductor", *RIVALS}
    elif not torch.cuda.is_available():
        expected = "an NVIDIA GPU that this torch can use; none was found. --interpret runs toy sizes on the CPU, without times"
        raise InvalidOption(name="--interpret", got=False, expected=expected)
    chosen, device = shapes(names.split(",")), torch.device("cpu" if interpret else "cuda")
    began, roofline = time.perf_counter(), copy_gbps(device)
    common = head("kernels") | {"dtype": "bfloat16", "copy_gbps": roofline, "tuned": sorted(tuned)}
    rows: list[dict[str, Any]] = []
    fastest: Fastest = {}
    if out is not None:
        start(out)
    cases = [(count, width, shape) for count in counts for width in widths for shape in chosen]
    for done, (count, width, shape) in enumerate(cases):
        if time.perf_counter() - began > seconds:
            print(f"out of time: {len(cases) - done} of {len(cases)} matmuls not started", file=sys.stderr)
            break
        for row in measure(shape, shares, count, width, known, device, fastest, tuned=tuned):
            row = common | row | {"roofline": row["gbps"] / roofline if roofline else None}
            rows.append(row)
            if out is not None:
                append(out, row)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    table(rows)
    configs_table(rows)
    return rows


def measure(
    shape: Shape, shares: list[int], count: int, width: int, known: set[str], device: torch.device, fastest: Fastest, *,
    tuned: Collection[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one matmul: dense implementations once for all widths, the others for each masked fraction. tuned: kernels that run
    with all their configs.
    """
    from bench.speed import operands

    case = operands.make_case(shape, count, width, buffer_count(shape.K * shape.N * width / 8, device), device)
    facts = {"op": shape.op, "shape": shape.name, "K": shape.K, "N": shape.N, "tokens": count}
    rows = []
    if (shape.name, count) not in fastest:
        for name in sorted(known & {"cublas", "inductor"}):
            row = check_and_time(case.dense_trial(name), case.dense_bytes, device)
            rows.append(facts | {"impl": name, "bits": 16, "masked": 0} | row)
        fastest[shape.name, count] = min((row["us"]["p50"] for row in rows if row["passed"]), default=float("inf"))
    best = fastest[shape.name, count]
    others = rival_rows(case, known, best, device) if width == RIVAL_BITS else []
    rows += [facts | row for row in others]
    rival = min((row["us"]["p50"] for row in others if row["passed"]), default=None)
    has_fallback = shape.op == "masked_gemv" and width == 16 and "fallback" in known
    fallbacks = case.fallback_trials(shares) if has_fallback else {}
    for share in [0] if shape.op == "router" else shares:
        implementations = case.kernel_trials(share, tuned)
        if shape.op == "masked_gemv" and count == 1 and width == 16 and "published" in known:
            implementations |= case.published_trials(share)
        if share in fallbacks:
            implementations["fallback"] = [fallbacks[share]]
        for name, trials in implementations.items():
            found = [check_and_time(trial, case.bytes_read(share), device) for trial in trials]
            row = min(found, key=lambda row: (not row["passed"], row["us"]["p50"]))
            row |= {"speedup": over(best, row), "rival_us": rival, "over_rival": over(rival, row)}
            sizes = shape.K, shape.N, count, 1 - share / 100
            if name == "masked":
                row["preferred"] = prefers_masked(*sizes, bits=width)
            if shape.op == "router":
                row["expected_us"] = EXPECTED_OF_ROUTERS[name.removesuffix("+norm")](shape.N, shape.K, count, bits=width)
            elif name in EXPECTED_US:
                row["expected_us"] = EXPECTED_US[name](*sizes, bits=width)
            if name in tuned:
                row["tried"] = [{key: one[key] for key in ("config", "passed")} | {"us": one["us"]["p50"]} for one in found]
            rows.append(facts | {"impl": name, "bits": width, "masked": share} | row)
    return rows


def rival_rows(case: Any, known: set[str], best: float, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the 4-bit matmuls of others, without the facts of the matmul. A rival that fails is named on stderr."""
    rows = []
    for name in sorted(known & set(RIVALS)):
        try:
            trial = case.rival_trial(name)
            row = check_and_time(trial, trial.stored, device)
        except Exception as error:  # no package, no kernel for the device or the shape: the others are still timed
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name}, {case.shape.name}: not timed: {reason}", file=sys.stderr)
            continue
        rows.append({"impl": name, "bits": RIVAL_BITS, "masked": 0} | row | {"speedup": over(best, row)})
    return rows


def over(us: float | None, row: dict[str, Any]) -> float | None:
    """How many times as fast the row is as something that takes ``us``. A wrong result has no speed-up."""
    return us / row["us"]["p50"] if row["passed"] and us is not None and 0 < us < float("inf") else None


def check_and_time(trial: Any, bytes_read: float, device: torch.device) -> dict[str, Any]:
    """Compare a trial with fp64, then time it over all its buffers."""
    first: Callable[[], Tensor] = trial.calls[0]
    got, again = first().clone(), first().clone()
    error = error_ratio(got.reshape(trial.exact.shape), trial.exact, trial.magnitude, trial.terms, trial.roundings)
    calls: list[Call] = trial.calls
    us: Times = timed(calls, device)
    return {
        "us": us._asdict(),
        "gbps": bytes_read / us.p50 / 1e3 if us.p50 else 0.0,
        "error_over_bound": error,
        "passed": error <= 1,
        "bit_equal": torch.equal(got, again),
        "config": trial.config,
    }


def numbers(name: str, text: str, low: int, high: int) -> list[int]:
    """Integers separated by commas, from ``low`` to ``high``. Raises InvalidOption."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(low <= number <= high for number in found):
        raise InvalidOption(name=name, got=text, expected=f"whole numbers from {low} to {high}, by commas")
    return found


def table(rows: list[dict[str, Any]]) -> None:
    """Print one line per row."""
    columns = ("shape", "tokens", "bits", "masked %", "kernel", "us", "GB/s", "of copy", "speed-up", "x rival", "correct",
               "same bits")  # fmt: skip
    keys = ("shape", "tokens", "bits", "masked", "impl")
    lines = [
        (
            *(row[key] for key in keys),
            row["us"]["p50"],
            row["gbps"],
            row["roofline"],
            row.get("speedup"),
            row.get("over_rival"),
            row["passed"],
            row["bit_equal"],
        )
        for row in rows
    ]
    if rows:
        show(f"{rows[0]['device']}, copy bandwidth {rows[0]['copy_gbps']:.0f} GB/s", columns, lines)


if __name__ == "__main__":
    typer.run(main)
