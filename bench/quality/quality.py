"""Loss and perplexity against budget, per recipe and rival.

In: a model, a calibration text and evaluation texts. Out: one JSONL row per text, recipe and budget (loss, perplexity, what
predictions differ in from the dense model's, and the budget measured on that text, which is what the curve is drawn against),
a table, and a plot. A budget that cannot be reached gives a row with the reason. The model is calibrated once; each plan is
solved once and evaluated on every text.

Beside the recipes of the package: ``slicegpt`` (bench/quality/slicegpt.py), and roundings such as ``int4-g64``, ``gptq4-g128``,
``int3-g64-asym`` (bench/quality/quantised.py). A rounding is one point: with ``--metric bytes`` it is evaluated once, at the
bytes it takes, whatever the budgets; with ``--metric flops``, of which it saves none, it is left out.

    python -m bench.quality MODEL --calib calib.jsonl.xz --text valid.jsonl.xz --out bench/results/quality-NAME.jsonl
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.common.calibrated import batches_of, calibrate_once
from bench.common.documents import Text, read_text
from bench.common.plot import plot
from bench.common.record import append, start
from bench.common.table import table
from bench.quality.divergence import compare
from bench.quality.methods import Entrant, Maker
from bench.quality.quantised import Rounding, rounding_of
from bench.quality.slicegpt import stream_of
from rana_fx.errors import BudgetUnreachable, InvalidOption, TooFewTokens
from rana_fx.evaluation.perplexity import Quality, evaluate, load_model
from rana_fx.modules import device_of
from rana_fx.recipes import RECIPES

_ROUNDINGS = "int8,int4-g64,int4-g128,int3-g64,int3-g128,gptq4-g64,gptq4-g128,gptq3-g64,gptq3-g128,gptq4-g64-asym,gptq3-g64-asym"


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    text: Annotated[list[str], typer.Option(help="Evaluation text; may be given several times.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    recipes: Annotated[
        str, typer.Option(help="Recipes, slicegpt and roundings, by commas.")
    ] = f"dense,static,cats,teal,wina,paper,rana,{_ROUNDINGS}",
    budgets: Annotated[str, typer.Option(help="Budgets, by commas.")] = "0.8,0.7,0.58,0.5,0.4",
    metric: Annotated[str, typer.Option(help="What the budgets count: flops or bytes.")] = "flops",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_000,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of each evaluation text.")] = 65_536,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16: with --metric bytes, of what the budget is a part.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the token sample.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Plot of the increase of the loss against measured budget.")] = None,
) -> None:
    """Loss of MODEL against budget, per recipe."""
    names, asked = recipes.split(","), [float(value) for value in budgets.split(",")]
    roundings = {name: found for name in names if (found := rounding_of(name)) is not None}
    known = {*RECIPES, *roundings, "slicegpt"}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown recipes {unknown}: pick of {', '.join(RECIPES)}, slicegpt, {_ROUNDINGS}")
    progress = sys.stderr.isatty()
    network, tokenizer = load_model(model, dtype=dtype)
    if "slicegpt" in names:
        stream_of(network)  # refused before anything is computed
    texts = {Path(source).name: read_text(source, tokenizer, tokens=eval_tokens, context=context) for source in text}
    batches = batches_of(calib, tokenizer, tokens=tokens, context=context)
    calibrated = calibrate_once(network, batches, seed=seed, progress=progress)
    common = calibrated.head("quality", model, calib, context=context, dtype=dtype) | {"metric": metric}
    start(out)
    rows: list[dict[str, Any]] = []

    def add(**facts: Any) -> None:
        row = common | facts
        append(out, row)
        rows.append(row)
        print(" ".join(f"{key}={row.get(key)}" for key in ("text", "recipe", "budget", "perplexity", "unreachable")), flush=True)

    dense: dict[str, Quality] = {}
    for name, found in texts.items():
        began = time.perf_counter()
        dense[name] = evaluate(network, found.batches, progress=progress)
        if "dense" in names:
            full = {"flops": 1.0, "bytes": 1.0}
            facts = {"recipe": "dense", "budget": 1.0, "expected": full, "measured": full}
            add(text=name, **facts, **against(dense[name], dense[name]), eval_seconds=time.perf_counter() - began)
    maker = Maker(network, calibrated, batches, metric=metric, progress=progress)
    points: list[tuple[str, float | Rounding]] = [
        (name, budget) for budget in asked for name in names if name != "dense" and name not in roundings
    ]
    if metric == "bytes":
        points += roundings.items()
    elif roundings:
        print(f"left out, since they save no multiply-adds: {', '.join(roundings)}", flush=True)
    for recipe, point in points:
        began = time.perf_counter()
        budget = maker.bytes_kept(point) if isinstance(point, Rounding) else point
        try:
            entrant = maker.rounded(point) if isinstance(point, Rounding) else maker.at(recipe, point)
        except (BudgetUnreachable, InvalidOption, TooFewTokens) as error:
            for name in texts:
                add(text=name, recipe=recipe, budget=budget, dense_loss=dense[name].mean_loss, unreachable=str(error))
            continue
        solved = time.perf_counter() - began
        for name, found in texts.items():
            facts = evaluated(network, entrant, found, dense[name], progress=progress)
            add(text=name, recipe=recipe, budget=budget, **facts, solve_seconds=solved)
    table(rows)
    if png is not None:
        plot([row for row in rows if row["metric"] == metric], png)


def evaluated(network: Any, entrant: Entrant, text: Text, dense: Quality, *, progress: bool) -> dict[str, Any]:
    """What a row says of an entrant on one text."""
    began = time.perf_counter()
    with entrant.on(network) as running:
        quality, compared = compare(running.adapted, running.dense, text, progress=progress, device=device_of(network))
        measured = running.measured()
    return {
        "expected": entrant.expected,
        "measured": measured,
        **against(quality, dense),
        **asdict(compared),
        **entrant.facts,
        "eval_seconds": time.perf_counter() - began,
    }


def against(found: Quality, dense: Quality) -> dict[str, float]:
    """Losses of a model beside those of the dense one."""
    return {
        "mean_loss": found.mean_loss,
        "perplexity": found.perplexity,
        "dense_loss": dense.mean_loss,
        "delta": found.mean_loss - dense.mean_loss,
        "tokens": found.tokens,
    }


if __name__ == "__main__":
    typer.run(main)
