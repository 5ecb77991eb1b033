"""Cost of adapting and compiling: seconds per stage, peak memory, compile time against Inductor's.

In: a model and a calibration text. Out: JSONL rows of two kinds, and tables. ``adapt``: seconds to load, calibrate, solve and
attach, and the peak resident memory of the process in MiB, for each number of tokens (memory should not grow once the sample is
full). ``compile``: seconds of the first and second call of the model compiled by backend "inductor" (dense) and by "rana". Each
row is measured in a process of its own, with an empty Inductor cache.

    python -m bench.speed.adapt_cost MODEL --calib calib.jsonl.xz --out bench/results/adapt-cost-NAME.jsonl
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.common.calibrated import batches_of
from bench.common.record import ROOT, append, head, start
from rana_fx.commands.record import show
from rana_fx.evaluation.perplexity import load_model
from rana_fx.plan import load_plan
from rana_fx.runtime.attachment import attach

_TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"
app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    tokens: Annotated[str, typer.Option(help="Numbers of calibration tokens, by commas.")] = "32000,256000",
    budget: Annotated[float, typer.Option(help="Budget in flops.")] = 0.58,
    recipe: Annotated[str, typer.Option(help="Recipe.")] = "paper",
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
) -> None:
    """Seconds and memory of adapting and of compiling, each in a fresh process."""
    common = head("adapt_cost") | {
        "model": Path(model).name, "calibration": Path(calib).name, "recipe": recipe, "budget": budget, "context": context,
    }  # fmt: skip
    start(out)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        plan = str(Path(folder) / "plan")
        for count in tokens.split(","):
            job = {"model": model, "calib": calib, "tokens": int(count), "budget": budget, "recipe": recipe, "context": context}
            # the plan of the first row is compiled below
            rows.append(_fresh("adapt-worker", job | {"plan": None if rows else plan}))
            append(out, common | rows[-1])
        for backend in ("inductor", "rana"):
            rows.append(_fresh("compile-worker", {"model": model, "plan": plan, "backend": backend, "context": context}))
            append(out, common | rows[-1])
    stages = ("load_seconds", "calibrate_seconds", "solve_seconds", "attach_seconds", "peak_rss_mib")
    adapts = [(f"{row['tokens']:,} tokens", *(row[key] for key in stages)) for row in rows if row["kind"] == "adapt"]
    show(f"{common['model']}: adapt, recipe {recipe}", ("calibration", *stages), adapts)
    calls = ("first_call_seconds", "second_call_seconds", "peak_rss_mib")
    compiles = [(row["backend"], *(row[key] for key in calls)) for row in rows if row["kind"] == "compile"]
    show(f"{common['model']}: compile, batch 1 of {context} tokens", ("backend", *calls), compiles)


@app.command(hidden=True)
def adapt_worker(job: str) -> None:
    """Time the steps of ``rana_fx.adapt``."""
    from rana_fx.adaptation import calibrated, planned, solved
    from rana_fx.recipes import RECIPES

    given = json.loads(job)
    marks = [time.perf_counter()]
    model, tokenizer = load_model(given["model"], dtype="float32")
    batches = batches_of(given["calib"], tokenizer, tokens=given["tokens"], context=given["context"])
    before = _peak_mib()
    marks.append(time.perf_counter())
    chosen = RECIPES[given["recipe"]]
    calibration = calibrated(model, batches, chosen)
    marks.append(time.perf_counter())
    problem = calibration.problem(budget=given["budget"], metric="flops", recipe=given["recipe"])
    adapters = solved(problem, chosen)
    marks.append(time.perf_counter())
    plan = planned(calibration, problem, adapters)
    attach(model, plan)
    marks.append(time.perf_counter())
    if given["plan"] is not None:
        plan.save(given["plan"])
    names = ("load", "calibrate", "solve", "attach")
    seconds = {f"{name}_seconds": marks[i + 1] - marks[i] for i, name in enumerate(names)}
    _reply({"kind": "adapt", "tokens": plan.tokens, **seconds, "rss_before_mib": before, "peak_rss_mib": _peak_mib()})


@app.command(hidden=True)
def compile_worker(job: str) -> None:
    """Time the first and second call of the compiled model; the cache folder is empty."""
    import rana_fx

    given = json.loads(job)
    model, _ = load_model(given["model"], dtype="float32")
    if given["backend"] == "rana":
        attach(model, load_plan(given["plan"]))
    ids_BT = torch.randint(model.config.vocab_size, (1, given["context"]), generator=torch.Generator().manual_seed(0))
    ids_BT = ids_BT.to(model.device)
    backend: Any = rana_fx.backend if given["backend"] == "rana" else "inductor"
    compiled = torch.compile(model, backend=backend)
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            float(compiled(input_ids=ids_BT, use_cache=False).logits.sum())  # synchronises with the device
            seconds.append(time.perf_counter() - began)
    calls = {"first_call_seconds": seconds[0], "second_call_seconds": seconds[1]}
    _reply({"kind": "compile", "backend": given["backend"], **calls, "peak_rss_mib": _peak_mib()})


def _fresh(command: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a worker in a process with an empty Inductor cache; the last line of its stdout is the result."""
    with tempfile.TemporaryDirectory() as cache:
        words = [sys.executable, "-m", "bench.speed.adapt_cost", command, json.dumps(job)]
        environment = os.environ | {_TORCH_CACHE: cache}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} {job} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _reply(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


if __name__ == "__main__":
    # measure is the default command
    known = {"measure", "adapt-worker", "compile-worker", "--help"}
    if len(sys.argv) > 1 and sys.argv[1] not in known:
        sys.argv.insert(1, "measure")
    app()
