"""Perplexity against budget, per recipe.

In: a model, a calibration text and evaluation texts. Out: one JSONL row per text, recipe and budget (loss, perplexity, and the
budget measured on that text, which is what the curve is drawn against), a table, and a plot. A budget that a recipe cannot
reach gives a row with the reason. The model is calibrated once; each plan is solved once and evaluated on every text.

    python -m bench.quality MODEL --calib calib.jsonl.xz --text valid.jsonl.xz --out bench/results/quality-NAME.jsonl
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.compare import compare
from bench.once import batches_of, calibrate_once
from bench.record import append, head, start
from bench.table import plot, table
from rana_fx.attachment import attach, detach
from rana_fx.errors import BudgetUnreachable, TooFewTokens
from rana_fx.evaluate import evaluate, load_model
from rana_fx.recipes import RECIPES


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    text: Annotated[list[str], typer.Option(help="Evaluation text; may be given several times.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    recipes: Annotated[str, typer.Option(help="Recipes, by commas.")] = "dense,static,cats,teal,wina,paper,rana",
    budgets: Annotated[str, typer.Option(help="Budgets, by commas.")] = "0.8,0.7,0.58,0.5,0.4",
    metric: Annotated[str, typer.Option(help="What the budgets count: flops or bytes.")] = "flops",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_000,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of each evaluation text.")] = 65_536,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16: with --metric bytes, of what the budget is a part.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the token sample.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Plot of perplexity against measured budget.")] = None,
) -> None:
    """Perplexity of MODEL against budget, per recipe."""
    names, asked = recipes.split(","), [float(value) for value in budgets.split(",")]
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise typer.BadParameter(f"unknown recipes {unknown}: pick of {', '.join(RECIPES)}")
    progress = sys.stderr.isatty()
    network, tokenizer = load_model(model, dtype=dtype)
    texts = {Path(source).name: batches_of(source, tokenizer, tokens=eval_tokens, context=context) for source in text}
    calibrated = calibrate_once(
        network, batches_of(calib, tokenizer, tokens=tokens, context=context), seed=seed, progress=progress
    )
    common = head("quality") | {
        "model": Path(model).name,
        "calibration": Path(calib).name,
        "calibration_tokens": calibrated.tokens,
        "context": context,
        "dtype": dtype,
        "metric": metric,
        "seed": seed,
    }
    start(out)
    rows: list[dict[str, Any]] = []

    def add(**facts: Any) -> None:
        row = common | facts
        append(out, row)
        rows.append(row)
        print(" ".join(f"{key}={row.get(key)}" for key in ("text", "recipe", "budget", "perplexity", "unreachable")), flush=True)

    dense = {}
    for name, batches in texts.items():
        began = time.perf_counter()
        dense[name] = evaluate(network, batches, progress=progress)
        if "dense" in names:
            full = {"flops": 1.0, "bytes": 1.0}
            facts = {"recipe": "dense", "budget": 1.0, "expected": full, "measured": full}
            add(text=name, **facts, **_quality(dense[name], dense[name]), eval_seconds=time.perf_counter() - began)
    for budget in asked:
        for recipe in (name for name in names if name != "dense"):
            began = time.perf_counter()
            try:
                plan = calibrated.plan(budget=budget, metric=metric, recipe=recipe, progress=progress)
            except (BudgetUnreachable, TooFewTokens) as error:
                for name in texts:
                    add(text=name, recipe=recipe, budget=budget, dense_loss=dense[name].mean_loss, unreachable=str(error))
                continue
            solved = time.perf_counter() - began
            attach(network, plan)
            expected = {unit: plan.expected_budget(unit) for unit in ("flops", "bytes")}
            for name, batches in texts.items():
                began = time.perf_counter()
                quality, measured, compared = compare(network, batches, progress=progress)
                add(
                    text=name,
                    recipe=recipe,
                    budget=budget,
                    expected=expected,
                    measured={"flops": measured.budget_flops, "bytes": measured.budget_bytes},
                    **_quality(quality, dense[name]),
                    **asdict(compared),
                    digest=plan.digest()[:12],
                    solve_seconds=solved,
                    eval_seconds=time.perf_counter() - began,
                )
            detach(network)
    table(rows, metric)
    if png is not None:
        plot(rows, metric, png)


def _quality(found: Any, dense: Any) -> dict[str, float]:
    return {
        "mean_loss": found.mean_loss,
        "perplexity": found.perplexity,
        "dense_loss": dense.mean_loss,
        "delta": found.mean_loss - dense.mean_loss,
        "tokens": found.tokens,
    }


if __name__ == "__main__":
    typer.run(main)
