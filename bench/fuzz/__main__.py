"""Draw random examples, run them, and count the outcomes.

In: nothing; hypothesis draws models, plans, options and calls (bench/fuzz/spec.py). Out: a table of outcomes, and with ``--out``
JSONL: a row of counts, and a row for each kind of fault with its smallest example. Exit status 1 if a compiled model differed
from the oracle, crashed, or ran dense without a report.

    python -m bench.fuzz --examples 10000 --workers 2 --out bench/results/fuzz-cpu.jsonl
    python -m bench.fuzz --examples 2000 --device cuda --workers 8 --out bench/results/fuzz-h200.jsonl
    python -m bench.fuzz --replay '{"seed": 3, ...}'                        # one example, copied from a row
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.common.record import append, head, start
from bench.fuzz.spec import Spec, specs
from bench.fuzz.trial import FAULTS, Outcome, attempt
from rana_fx.atomic import write_bytes
from rana_fx.commands.record import show

Seen = dict[str, Any]  # counts by outcome, declined places, and faults by their text
SAVED_EVERY = 10.0  # seconds between two writes of a worker's counts
GRACE = 45.0  # seconds a worker has, after its time, for the example it is at


class _TimeIsUp(BaseException):
    """Ends hypothesis' drawing, which catches every Exception."""


def main(
    examples: Annotated[int, typer.Option(help="How many to draw, in all workers.", min=1)] = 1000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    lowered: Annotated[int, typer.Option(help="One in so many goes through Inductor; 0: none.", min=0)] = 50,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Draw no new example after this long.")] = 36000.0,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    replay: Annotated[str | None, typer.Option(help="One example as JSON, instead of drawn ones.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file; overwritten.")] = None,
) -> None:
    """Compare compiled models with an oracle on random examples."""
    torch.set_num_threads(1)
    if replay is not None:
        given = json.loads(replay)
        spec = Spec(**given | {"kinds": tuple(given["kinds"]), "calls": tuple(map(tuple, given["calls"]))})
        for through in (False, True):
            print("through Inductor" if through else "as rewritten", attempt(spec, torch.device(device), lowered=through))
        return
    begun = time.perf_counter()
    seen = (
        draw(examples, device, lowered, seconds, seed)
        if workers == 1
        else _spread(workers, examples, device, lowered, seconds, seed)
    )
    faults = {text: found for text, found in seen["faults"].items() if found["kind"] in FAULTS}
    facts = head("fuzz") | {
        "on": device, "examples": sum(seen["kinds"].values()), "lowered": seen["lowered"], "kinds": seen["kinds"],
        "declined": seen["declined"], "refused": seen["refused"], "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    if out is not None:
        start(out)
        append(out, facts)
        for text, found in faults.items():
            append(out, {"bench": "fuzz", "fault": text} | found)
    show(f"{facts['examples']} examples on {device}", ("outcome", "examples"), sorted(seen["kinds"].items()))
    show("refused", ("error", "examples"), sorted(seen["refused"].items()))
    for text, found in faults.items():
        print(f"{found['kind']} ({found['count']} examples): {text}\n  --replay '{json.dumps(found['spec'])}'")
    raise typer.Exit(1 if faults else 0)


def draw(examples: int, device: str, lowered: int, seconds: float, seed: int, saved: Path | None = None) -> Seen:
    """Draw and run examples in this process. Faults are grouped by text; each group keeps its smallest example.

    Args:
        examples: number of examples. device: "cpu" or "cuda". lowered: one in this many goes through Inductor; 0: none.
        seconds: no new example is run after this time. seed: of the examples.
        saved: JSON file that has the counts so far, at most ``SAVED_EVERY`` seconds and an example old.
    """
    import hypothesis
    from tqdm import tqdm

    seen: Seen = {"kinds": collections.Counter(), "refused": collections.Counter(), "faults": {}, "declined": 0, "lowered": 0}
    deadline = time.perf_counter() + seconds
    written = -math.inf
    bar = tqdm(total=examples, disable=None, desc="examples")

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(specs())
    def run(spec: Spec) -> None:
        nonlocal written
        if time.perf_counter() > deadline:
            raise _TimeIsUp
        through = bool(lowered) and spec.seed % lowered == 0
        outcome = attempt(spec, torch.device(device), lowered=through)
        _count(seen, spec, outcome, through)
        bar.update()
        if saved is not None and time.perf_counter() - written > SAVED_EVERY:
            write_bytes(saved, json.dumps(seen).encode())
            written = time.perf_counter()

    with contextlib.suppress(_TimeIsUp):
        run()
    bar.close()
    if saved is not None:
        write_bytes(saved, json.dumps(seen).encode())
    return seen


def _count(seen: Seen, spec: Spec, outcome: Outcome, through: bool) -> None:
    seen["kinds"][outcome.kind] += 1
    seen["lowered"] += through
    seen["declined"] += bool(outcome.declined)
    if outcome.kind == "refused":
        seen["refused"][outcome.detail.partition(":")[0]] += 1
    if outcome.kind in FAULTS:
        text = outcome.detail if outcome.kind == "crash" else f"{outcome.kind}, {_oddities(spec)}"
        found = seen["faults"].setdefault(
            text[:500], {"kind": outcome.kind, "count": 0, "spec": spec.to_dict(), "detail": outcome.detail}
        )
        found["count"] += 1
        if _size(spec) < _size(found["spec"]):
            found |= {"spec": spec.to_dict(), "detail": outcome.detail}


def _oddities(spec: Spec) -> str:
    """The settings of an example that differ from the usual ones: the most frequent cause of its fault."""
    usual = {
        "dropout": "none",
        "cast": "none",
        "write": "none",
        "branch": "none",
        "cache": "none",
        "form": "linear",
        "prefill": "masked",
    }
    odd = [f"{key}={getattr(spec, key)}" for key, value in usual.items() if getattr(spec, key) != value]
    return ", ".join([*odd, spec.plan, spec.dtype, *(["gradients"] if spec.gradients else [])])


def _size(spec: Spec | dict[str, Any]) -> int:
    """The size of an example, by which the smallest one is chosen: unusual settings, then layers, calls and features."""
    given = spec.to_dict() if isinstance(spec, Spec) else spec
    odd = sum(
        given[key] not in ("none", "linear", "masked", "float32")
        for key in ("dropout", "cast", "write", "branch", "cache", "form")
    )
    return 1000 * odd + 100 * given["layers"] + given["width"] + given["ffn"] + 10 * len(given["calls"])


def _spread(workers: int, examples: int, device: str, lowered: int, seconds: float, seed: int) -> Seen:
    """``draw`` in several processes with different seeds; returns the merged counts. A process that is still at an example
    ``GRACE`` seconds after its time is killed; what it had counted is kept."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for worker in range(workers):
            share = examples // workers + (worker < examples % workers)
            code = (
                "import pathlib, torch; torch.set_num_threads(1); from bench.fuzz.__main__ import draw; "
                f"draw({share}, {device!r}, {lowered}, {seconds}, {seed * 1000 + worker}, "
                f"pathlib.Path({str(Path(folder, f'{worker}.json'))!r}))"
            )
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            running.append(subprocess.Popen([sys.executable, "-c", code], env=environment))
        last = time.perf_counter() + seconds + GRACE
        cut = 0
        for process in running:
            try:
                process.wait(max(0.0, last - time.perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                cut += 1
        parts = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    total: Seen = {"kinds": collections.Counter(), "refused": collections.Counter(), "faults": {}, "declined": 0, "lowered": 0}
    for part in parts:
        total["kinds"].update(part["kinds"])
        total["refused"].update(part["refused"])
        total["declined"] += part["declined"]
        total["lowered"] += part["lowered"]
        for text, found in part["faults"].items():
            known = total["faults"].setdefault(text, found | {"count": 0})
            known["count"] += found["count"]
    lost = sum(process.returncode != 0 for process in running) - cut
    if lost:
        # the example at which a process died is in no count
        total["faults"][f"{lost} of {workers} processes died"] = {"kind": "crash", "count": lost, "spec": {}, "detail": ""}
    return total


if __name__ == "__main__":
    typer.run(main)
