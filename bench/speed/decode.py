"""Tokens per second of decoding: the dense model (eager and compiled), plans at several budgets, and quantised rivals.

In: a shape of ``bench.models`` (random weights, plans without calibration) or a checkpoint. Out: JSONL rows, each written at
once, and a table: tokens/s, ms per token (p20, p50, p80), ratio to the fastest dense variant, GB/s of weights. The protocol is
the paper's: contexts of 1 to 1000 tokens, drawn by a seed, 492 tokens decoded after each, one device, a static cache. The logits
of every variant are compared with its reference first (``bench.speed.verify``): a variant with wrong results has no time.

    python -m bench.speed.decode llama-2-7b --out bench/results/decode-llama-2-7b.jsonl --variants reduce-overhead,rana \\
        --budgets 0.6,0.5,0.4 --sequences 10 --prefill 0 --seconds 480
    python -m bench.speed.decode llama-1b --out rows.jsonl --sequences 2 --new-tokens 16 --longest 32 --batches 1,4
    python -m bench.speed.decode llama-2-7b --out rows.jsonl --variants reduce-overhead,rana,int8,fp8,int4,gemlite --prefill 0
    python -m bench.speed.decode MODEL --device cpu --out rows.jsonl --variants rana,llama.cpp:Q4_0,Q8_0,F16 --plan PLAN \\
        --budgets '' --prefill 0 --text text.txt

Rows of plans and of dense+attention have ``predicted_ms``, the step that the cost model expects (rana_fx/step_time.py; batch
1 on a GPU). Kinds of rows: ``device`` (copy bandwidth, bytes of weights), ``decode``, ``prefill``, ``kernels`` (--profile),
``skipped`` with the reason (an error, wrong logits, no time left). The key ``gate`` holds the comparison with the reference,
``loss`` the loss on the text of --text. Rows of llama.cpp have no such reference: their ``gate`` is null, and ``conversion``
compares its file. Compile time is that of the first three calls, CUDA-graph capture included; for llama.cpp also that of
loading the file.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.common.models import build
from bench.common.record import head, start
from bench.speed.decoding import contexts, copy_bandwidth
from bench.speed.latency import Protocol, Run, compare, dense_ratio
from bench.speed.llama_variant import gguf_files
from bench.speed.losses import read_text
from bench.speed.random_plan import layout_of, plan_configs
from bench.speed.variants import variants
from rana_fx.commands.record import show
from rana_fx.cost import SCOPES
from rana_fx.errors import UnknownChoice


def main(
    model: Annotated[str, typer.Argument(help="A shape (llama-2-7b, llama-3-8b, gemma-2b, pythia-1.4b, ...) or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    names: Annotated[
        str,
        typer.Option(
            "--variants",
            help="Some of eager, reduce-overhead, max-autotune, dense+attention, rana, and quantised rivals: int8, fp8, int4 "
            "(torchao), gemlite, llama.cpp:TYPE (a type of GGUF; further types after it by commas; batch 1 on a CPU).",
        ),
    ] = "eager,reduce-overhead,rana",
    budgets: Annotated[str, typer.Option(help="Budgets of random plans, in bytes, by commas.")] = "0.8,0.6,0.5,0.4",
    plan: Annotated[list[Path] | None, typer.Option(help="Saved plan of the checkpoint; may be given several times.")] = None,
    scope: Annotated[str, typer.Option(help="Linears that random plans adapt: blocks, or all (output head too).")] = "blocks",
    mode: Annotated[str, typer.Option(help="Mode of torch.compile for rana.")] = "reduce-overhead",
    prefill_mode: Annotated[str, typer.Option(help="Backend option prefill: masked, dense, cheapest or factors.")] = "masked",
    density: Annotated[float, typer.Option(help="Kept fraction of a router's ranks in random plans.")] = 0.5,
    stacked: Annotated[bool, typer.Option(help="One rank adapter for gate and up in random plans.")] = True,
    config: Annotated[
        str,
        typer.Option(
            "--menus",
            help="Kinds of random plans, by commas: rank (the paper's), neuron (input masks, one for linears with one input), "
            "apart (one input mask per linear); optionally with bits, as rank:ROUTER/FACTOR.",
        ),
    ] = "rank",
    batches: Annotated[str, typer.Option(help="Batch sizes, by commas.")] = "1",
    sequences: Annotated[int, typer.Option(help="Number of contexts to decode after.")] = 100,
    longest: Annotated[int, typer.Option(help="Longest context, in tokens.")] = 1000,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each context.")] = 492,
    prefill: Annotated[int, typer.Option(help="Tokens of the timed prefill; 0 for none (it compiles another graph).")] = 512,
    seconds: Annotated[float | None, typer.Option(help="Time limit of the run; sequences beyond it are left out.")] = None,
    profile: Annotated[bool, typer.Option(help="Also measure the time per kernel of a step.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32; auto: float32 on a CPU, else bfloat16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu; default: a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, plans, contexts and tokens.")] = 0,
    gguf: Annotated[
        Path | None, typer.Option(help="The checkpoint as an unquantised GGUF file, for llama.cpp; default: it is written.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text on which the loss of every variant is measured.")] = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens of that text, in windows of 512.")] = 2048,
) -> None:
    """Tokens per second of MODEL, dense and adapted."""
    began = time.perf_counter()
    if scope not in SCOPES:
        raise UnknownChoice(kind="scope", got=scope, valid=", ".join(SCOPES))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype if dtype != "auto" else "float32" if place.type == "cpu" else "bfloat16"
    made = plan_configs(config, density=density, stacked=stacked)
    chosen = variants(
        names, [float(value) for value in budgets.split(",") if value], plan or [], mode=mode, configs=made, prefill=prefill_mode
    )
    sizes = [int(value) for value in batches.split(",")]
    protocol = Protocol(contexts(sequences, longest, seed), new_tokens, prefill, sizes, seed, seconds, profile)
    read = None if text is None else read_text(model, text, text_tokens)
    network = build(model, device=place, dtype=dtype, seed=seed)
    common = head("decode") | {"model": Path(model).name, "dtype": dtype, "seed": seed}
    common |= {"new_tokens": new_tokens, "prefill_mode": prefill_mode}
    start(out)
    with torch.no_grad(), gguf_files(network, given=gguf) as files:
        run = Run(network, layout_of(network, scope), protocol, common, out, copy_bandwidth(place), began, files=files, text=read)
        weights = sum(site.flops * site.weight.element_size() for site in run.layout.sites.values())
        run.add("device", copy_gb_per_s=run.bandwidth / 1e9, weight_gb=weights / 1e9, load_seconds=time.perf_counter() - began)
        compare(run, chosen)
    table(run)


def table(run: Run) -> None:
    """Print one line per variant and batch size; ratios to the fastest dense variant of the run."""
    columns = ("variant", "batch", "tokens/s", "ms p20", "p50", "p80", "predicted", "x dense", "budget measured", "GB/s",
               "of copy", "prefill ms", "compile s", "peak GB", "RMSE", "loss")  # fmt: skip
    prefills = {(row["variant"], row["batch"]): row["prefill_ms"] for row in run.rows if row["kind"] == "prefill"}
    lines = []
    for row in run.rows:
        if row["kind"] != "decode":
            continue
        ms, rate, gate = row["ms_per_token"], row["weight_gb_per_s"], row["gate"] or {"fixed_error": None, "masked_error": None}
        lines.append((
            row["variant"], row["batch"], row["tokens_per_s"], ms["p20"], ms["p50"], ms["p80"], row.get("predicted_ms"),
            dense_ratio(run.rows, row["batch"], ms["p50"]), row.get("measured_budget", {}).get("bytes"), rate,
            None if rate is None else rate * 1e9 / run.bandwidth, prefills.get((row["variant"], row["batch"])),
            row["compile_seconds"], row["peak_gb"], gate["masked_error"] if gate["fixed_error"] is None else gate["fixed_error"],
            (row.get("loss") or {}).get("mean_loss"),
        ))  # fmt: skip
    skipped = [f"{row['variant']}: {row['reason']}" for row in run.rows if row["kind"] == "skipped"]
    show(f"{run.common['model']}, {run.common['dtype']}, {run.common['device']}", columns, lines, notes=skipped)


if __name__ == "__main__":
    typer.run(main)
