"""Loss and perplexity against budget, per recipe and baseline method, compared with the dense model.

In: a model, a calibration text and evaluation texts. Out: one JSONL row per text, recipe and budget (mean loss in nats,
perplexity, KL and agreement with the dense model's predictions, target budget, and the budget measured on that text as a fraction
of dense, the x axis of plots), a table, and a plot. A budget that cannot be reached gives a row with the reason. The model is
calibrated once; each plan is solved once and evaluated on every text.

Baselines beside the package's recipes: ``slicegpt`` (bench/quality/slicegpt.py), and roundings such as ``int4-g64``,
``gptq4-g128``, ``int3-g64-asym`` (bench/quality/quantised.py). A rounding is one point: with ``--metric bytes`` it is evaluated
once, at its own bytes, independently of --budgets; with ``--metric flops`` it is left out, since it saves no multiply-adds.

    python -m bench.quality MODEL --calib calib.jsonl.xz --text valid.jsonl.xz --out bench/results/quality-NAME.jsonl
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.common.calibrated import batches_of, calibrate_once
from bench.common.documents import Text, read_text
from bench.common.plot import plot
from bench.common.record import append, start
from bench.common.table import table
from bench.quality.divergence import compare
from bench.quality.methods import Method, MethodBuilder
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
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; --metric bytes is relative to it.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the token sample.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Plot of the increase of the loss against measured budget.")] = None,
) -> None:
    """Loss of MODEL against budget, per recipe."""
    names, targets = recipes.split(","), [float(value) for value in budgets.split(",")]
    roundings = _roundings(names)
    progress = sys.stderr.isatty()
    network, tokenizer = load_model(model, dtype=dtype)
    if "slicegpt" in names:
        stream_of(network)  # an unsupported architecture is refused before calibration
    texts = {Path(source).name: read_text(source, tokenizer, tokens=eval_tokens, context=context) for source in text}
    batches = batches_of(calib, tokenizer, tokens=tokens, context=context)
    calibrated = calibrate_once(network, batches, seed=seed, progress=progress)
    common = calibrated.head("quality", model, calib, context=context, dtype=dtype) | {"metric": metric}
    start(out)
    results = _Results(network, texts, common, out, progress)
    results.add_dense(rows="dense" in names)
    builder = MethodBuilder(network, calibrated, batches, metric=metric, progress=progress)
    for budget in targets:
        for name in names:
            if name != "dense" and name not in roundings:
                results.add_method(name, budget, partial(builder.at_budget, name, budget))
    if metric == "bytes":
        for name, rounding in roundings.items():
            results.add_method(name, builder.bytes_kept(rounding), partial(builder.rounded, rounding))
    elif roundings:
        print(f"left out, since they save no multiply-adds: {', '.join(roundings)}", flush=True)
    table(results.rows)
    if png is not None:
        plot([row for row in results.rows if row["metric"] == metric], png)


def _roundings(names: Sequence[str]) -> dict[str, Rounding]:
    """The roundings among the names. Raises BadParameter for names that are not known."""
    roundings = {name: found for name in names if (found := rounding_of(name)) is not None}
    known = {*RECIPES, *roundings, "slicegpt"}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown recipes {unknown}: pick of {', '.join(RECIPES)}, slicegpt, {_ROUNDINGS}")
    return roundings


@dataclass(eq=False)
class _Results:
    """Evaluates methods on every text and writes their rows. ``dense``: loss of the dense model by text."""

    network: Any
    texts: dict[str, Text]
    common: dict[str, Any]
    out: Path
    progress: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    dense: dict[str, Quality] = field(default_factory=dict)

    def add(self, **facts: Any) -> None:
        """Write a row and print a line about it."""
        row = self.common | facts
        append(self.out, row)
        self.rows.append(row)
        print(" ".join(f"{key}={row.get(key)}" for key in ("text", "recipe", "budget", "perplexity", "unreachable")), flush=True)

    def add_dense(self, *, rows: bool) -> None:
        """Evaluate the dense model on every text, with a row for each if ``rows``."""
        for name, text in self.texts.items():
            began = time.perf_counter()
            self.dense[name] = evaluate(self.network, text.batches, progress=self.progress)
            if rows:
                full = {"flops": 1.0, "bytes": 1.0}
                facts = {"recipe": "dense", "budget": 1.0, "expected": full, "measured": full}
                losses = loss_facts(self.dense[name], self.dense[name])
                self.add(text=name, **facts, **losses, eval_seconds=time.perf_counter() - began)

    def add_method(self, recipe: str, budget: float, make: Callable[[], Method]) -> None:
        """Make a method once and add a row per text; the reason instead if the budget cannot be reached."""
        began = time.perf_counter()
        try:
            method = make()
        except (BudgetUnreachable, InvalidOption, TooFewTokens) as error:
            for name in self.texts:
                self.add(text=name, recipe=recipe, budget=budget, dense_loss=self.dense[name].mean_loss, unreachable=str(error))
            return
        seconds = time.perf_counter() - began
        for name, text in self.texts.items():
            facts = evaluation_facts(self.network, method, text, self.dense[name], progress=self.progress)
            self.add(text=name, recipe=recipe, budget=budget, **facts, solve_seconds=seconds)


def evaluation_facts(network: Any, method: Method, text: Text, dense: Quality, *, progress: bool) -> dict[str, Any]:
    """Costs, losses and divergence of a method on one text, as fields of a row."""
    began = time.perf_counter()
    with method.on(network) as running:
        quality, compared = compare(running.adapted, running.dense, text, progress=progress, device=device_of(network))
        measured = running.measured()
    return {
        "expected": method.expected,
        "measured": measured,
        **loss_facts(quality, dense),
        **asdict(compared),
        **method.facts,
        "eval_seconds": time.perf_counter() - began,
    }


def loss_facts(found: Quality, dense: Quality) -> dict[str, float]:
    """Losses of a model and of the dense model, as fields of a row."""
    return {
        "mean_loss": found.mean_loss,
        "perplexity": found.perplexity,
        "dense_loss": dense.mean_loss,
        "delta": found.mean_loss - dense.mean_loss,
        "tokens": found.tokens,
    }


if __name__ == "__main__":
    typer.run(main)
