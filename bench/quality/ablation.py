"""Ablation of recipe ``rana``: the recipe without one of its options, at equal target budget, on held-out text.

In: a model, a calibration text and a held-out text. Out: one JSONL row per budget and variant, with the keys of ``bench.quality``
(increase of the mean loss over dense in nats with its interval, KL divergence, budget measured on the text as a fraction of
dense), and a table with every increase over that of the complete recipe. Variants:

    rana          the complete recipe
    alike         no gradients: equal weight for all output errors
    price         allocation by one multiplier for the whole model only
    fraction      allocation by one fraction of its cost for every unit only
    no-hybrid     no candidates with masks before routers
    no-rank       no rank and static candidates; hybrid ones, with a masked router, remain
    no-basis      only input thresholds and joint candidates of MLPs
    no-cuts       no joint candidates of MLPs, gated or not
    dense-gates   gates of joint candidates stay dense
    alone         every linear is a unit of its own: no shared routers
    unsettled     the multiplier is not refined on the adapted model, so compare at the measured budget
    no-bits, no-4-bits, nearest    with --metric bytes: 16 bits only; 16 and 8 bits only; 4 bits rounded to nearest

The model is calibrated once. To decide on an option, hold out documents of the calibration text and pass them as --text.

    python -m bench.quality.ablation MODEL --calib calib.jsonl.xz --text held.jsonl.xz --out bench/results/ablation-NAME.jsonl
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.common.calibrated import batches_of, calibrate_once
from bench.common.documents import read_text
from bench.common.record import append, start
from bench.quality.divergence import compare
from bench.quality.methods import Planned
from rana_fx.commands.record import show
from rana_fx.errors import BudgetUnreachable, TooFewTokens
from rana_fx.evaluation.perplexity import evaluate, load_model
from rana_fx.modules import device_of
from rana_fx.plan import METRICS
from rana_fx.recipes.rana.operating_point import KINDS
from rana_fx.recipes.rana.recipe import Rana


def _without(*kinds: str) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if kind not in kinds)


VARIANTS = {
    "rana": Rana(),
    "alike": Rana(weighted=False),
    "price": Rana(allocations=("multiplier",)),
    "fraction": Rana(allocations=("fraction",)),
    "no-hybrid": Rana(kinds=_without("hybrid")),
    "no-rank": Rana(kinds=_without("rank", "static")),
    "no-basis": Rana(kinds=_without("rank", "static", "hybrid")),
    "no-cuts": Rana(kinds=_without("gated", "exact")),
    "dense-gates": Rana(gates=False),
    "alone": Rana(shared=False),
    "unsettled": Rana(refine_lambda=False),
}
IN_BYTES = {
    "no-bits": Rana(bits=()),
    "no-4-bits": Rana(bits=(8,)),
    "nearest": Rana(error_feedback=False),
}


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    text: Annotated[str, typer.Option(help="Held-out text.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    variants: Annotated[str, typer.Option(help="Variants, by commas; default: all of the metric.")] = "",
    budgets: Annotated[str, typer.Option(help="Budgets, by commas.")] = "0.58,0.4",
    metric: Annotated[str, typer.Option(help="What the budgets count: flops, in float32, or bytes of bfloat16.")] = "flops",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_000,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 32_768,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the token sample.")] = 0,
) -> None:
    """Increase of the loss of recipe rana without one of its options."""
    if metric not in METRICS:
        raise typer.BadParameter(f"unknown metric {metric!r}: pick of {', '.join(METRICS)}")
    known = VARIANTS if metric == "flops" else VARIANTS | IN_BYTES
    names = variants.split(",") if variants else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown variants {unknown}: with --metric {metric}, pick of {', '.join(known)}")
    progress = sys.stderr.isatty()
    dtype = "float32" if metric == "flops" else "bfloat16"
    network, tokenizer = load_model(model, dtype=dtype)
    held = read_text(text, tokenizer, tokens=eval_tokens, context=context)
    batches = batches_of(calib, tokenizer, tokens=tokens, context=context)
    calibrated = calibrate_once(network, batches, seed=seed, progress=progress)
    dense = evaluate(network, held.batches, progress=progress).mean_loss
    common = calibrated.head("ablation", model, calib, context=context, dtype=dtype)
    common |= {"text": Path(text).name, "metric": metric, "dense_loss": dense}
    start(out)
    rows: list[dict[str, Any]] = []
    for budget in (float(value) for value in budgets.split(",")):
        for name in names:
            began = time.perf_counter()
            facts: dict[str, Any] = {"variant": name, "budget": budget, "fields": asdict(known[name])}
            try:
                method = Planned(calibrated.plan(budget=budget, metric=metric, recipe=known[name], progress=progress))
            except (BudgetUnreachable, TooFewTokens) as error:
                facts |= {"unreachable": str(error)}
            else:
                facts |= {"solve_seconds": time.perf_counter() - began}
                with method.on(network) as running:
                    quality, found = compare(running.adapted, running.dense, held, progress=progress, device=device_of(network))
                    facts |= {"measured": running.measured(), **asdict(quality), "delta": quality.mean_loss - dense}
                facts |= asdict(found) | method.facts
            append(out, common | facts)
            rows.append(facts)
            print(" ".join(f"{key}={facts.get(key)}" for key in ("variant", "budget", "delta", "unreachable")), flush=True)
    _table(f"{Path(model).name}, {metric}: increase of the loss without one option of the recipe", rows, metric)


def _table(title: str, rows: Sequence[dict[str, Any]], metric: str) -> None:
    whole = {row["budget"]: row.get("delta") for row in rows if row["variant"] == "rana"}
    lines = []
    for row in rows:
        delta, base = row.get("delta"), whole.get(row["budget"])
        ratio = delta / base if delta is not None and base else None
        measured = row["measured"][metric] if "measured" in row else None
        low, high = row.get("interval", (None, None))
        lines.append((row["variant"], row["budget"], measured, delta, low, high, row.get("kl"), ratio))
    show(title, ("variant", "budget", "measured", "delta", "2.5 %", "97.5 %", "KL", "/ rana"), lines)


if __name__ == "__main__":
    typer.run(main)
