"""Cost of adapting a model of a given size: seconds and peak memory of each stage.

In: a shape of ``bench.models`` (random weights) or a checkpoint, and numbers of calibration tokens: random ids, or a text. Out: a
JSONL row per number of tokens, each from a process of its own, and a table: ``seconds`` and ``gpu_gib`` by stage (peak GiB beyond
the model's own memory), the peak resident memory of the process in GiB, and the kinds and expected budget of the plan. Random
weights have no structure, so the plan's quality is meaningless; time and memory are not. Stages: calibrate, gradients, decompose,
allocate, build, attach; ``solve`` covers all stages between calibrate and attach.

    python -m bench.speed.adapt_scale llama-2-7b --out bench/results/adapt-scale-llama-2-7b.jsonl --tokens 32000,256000
    python -m bench.speed.adapt_scale tiny --out rows.jsonl --tokens 2000 --context 64 --device cpu --dtype float32
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.common.calibrated import batches_of
from bench.common.models import build, vocabulary_of
from bench.common.record import ROOT, append, head, start
from rana_fx.adaptation import calibrated, planned
from rana_fx.commands.record import show
from rana_fx.evaluation.perplexity import load_model
from rana_fx.recipes import RECIPES
from rana_fx.recipes.stages import solve_in_stages
from rana_fx.runtime.attachment import attach

_GIB = 2**30
_STAGES = ("calibrate", "gradients", "decompose", "allocate", "build", "attach")
app = typer.Typer(pretty_exceptions_enable=False)


@dataclass
class Clock:
    """Measures seconds and peak GPU memory by stage. ``own``: bytes of the model on the GPU."""

    device: torch.device
    own: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    gpu_gib: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Measure the code inside the context as ``stage``."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.synchronize()
                self.gpu_gib[stage] = (torch.cuda.max_memory_allocated() - self.own) / _GIB
            self.seconds[stage] = time.perf_counter() - began


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="A shape (llama-2-7b, llama-1b, tiny, ...) or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    tokens: Annotated[str, typer.Option(help="Numbers of calibration tokens, by commas.")] = "32000,256000",
    text: Annotated[str | None, typer.Option(help="Calibration text for a checkpoint; default: random ids.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe.")] = "rana",
    budget: Annotated[float, typer.Option(help="Budget.")] = 0.5,
    metric: Annotated[str, typer.Option(help="What the budget counts: flops or bytes.")] = "flops",
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
) -> None:
    """Seconds and memory of the stages of adapting, each number of tokens in a fresh process."""
    given = {
        "model": model, "text": text, "recipe": recipe, "budget": budget, "metric": metric, "context": context,
        "batch_size": batch_size, "dtype": dtype, "device": device,
    }  # fmt: skip
    # head() has the name of the device, which replaces "cuda" or "cpu"
    common = given | head("adapt_scale") | {"model": Path(model).name, "text": None if text is None else Path(text).name}
    start(out)
    rows = []
    for count in tokens.split(","):
        rows.append(_fresh(given | {"tokens": int(count)}))
        append(out, common | rows[-1])
    columns = ("tokens", *_STAGES, "peak GPU GiB over the model", "peak RSS GiB", "failed")
    facts = [
        (row["tokens"], *(row["seconds"].get(stage) for stage in _STAGES), max(row["gpu_gib"].values(), default=None),
         row["peak_rss_gib"], row["failed"])
        for row in rows
    ]  # fmt: skip
    show(f"{common['model']}: adapt, recipe {recipe}, budget {budget:g} in {metric}", columns, facts)


@app.command(hidden=True)
def worker(job: str) -> None:
    """Measure the steps of ``rana_fx.adapt``; the last line of stdout is the result."""
    given = json.loads(job)
    clock = Clock(torch.device(given["device"]))
    row: dict[str, Any] = {"tokens": given["tokens"], "failed": None}
    try:
        row |= _adapt(given, clock)
    except Exception as error:  # stages that were measured before the failure still give a row
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    row |= {"seconds": clock.seconds, "gpu_gib": clock.gpu_gib, "model_gpu_gib": clock.own / _GIB}
    if clock.device.type == "cuda":
        row["reserved_gpu_gib"] = torch.cuda.max_memory_reserved() / _GIB
    print(json.dumps(row | {"peak_rss_gib": _peak_gib()}), flush=True)


def _peak_gib() -> float:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss starts at the memory of the parent process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _adapt(given: dict[str, Any], clock: Clock) -> dict[str, Any]:
    if given["text"] is None:
        model: Any = build(given["model"], device=clock.device, dtype=given["dtype"])
        batches = random_batches(given["tokens"], given["context"], given["batch_size"], vocabulary_of(model))
    else:
        model, tokenizer = load_model(given["model"], dtype=given["dtype"], device=given["device"])
        batches = batches_of(
            given["text"], tokenizer, tokens=given["tokens"], context=given["context"], batch_size=given["batch_size"]
        )
    clock.own = torch.cuda.memory_allocated() if clock.device.type == "cuda" else 0
    before = _peak_gib()
    chosen = RECIPES[given["recipe"]]
    with clock.within("calibrate"):
        calibration = calibrated(model, batches, chosen)
    problem = calibration.problem(budget=given["budget"], metric=given["metric"], recipe=given["recipe"])
    began = time.perf_counter()
    with torch.no_grad():
        adapters = tuple(solve_in_stages(chosen, problem, clock.within))
    clock.seconds["solve"] = time.perf_counter() - began
    with clock.within("attach"):
        plan = planned(calibration, problem, adapters)
        attach(model, plan)
    kinds = [adapter.kind for adapter in adapters]
    return {
        "tokens": plan.tokens,
        "rss_before_gib": before,
        "expected": {unit: plan.expected_budget(unit) for unit in ("flops", "bytes")},
        "adapters": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "notes": list(plan.notes()),
    }


def random_batches(tokens: int, context: int, batch_size: int, vocabulary: int) -> list[dict[str, Any]]:
    """Random ids, (batch_size, context) each, with ``use_cache=False``; the last batch may have fewer sequences."""
    sequences = max(1, tokens // context)
    ids_BT = torch.randint(vocabulary, (sequences, context), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "use_cache": False} for part in ids_BT.split(batch_size)]


def _fresh(job: dict[str, Any]) -> dict[str, Any]:
    words = [sys.executable, "-m", "bench.speed.adapt_scale", "worker", json.dumps(job)]
    done = subprocess.run(words, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        # for example killed for lack of host memory
        failed = f"the process ended with {done.returncode}"
        return {"tokens": job["tokens"], "seconds": {}, "gpu_gib": {}, "peak_rss_gib": None, "failed": failed}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


if __name__ == "__main__":
    # measure is the default command
    if len(sys.argv) > 1 and sys.argv[1] not in ("measure", "worker", "--help"):
        sys.argv.insert(1, "measure")
    app()
