"""Error of MLP outputs per recipe, and the number of components an input needs: the paper's comparison with neuron adapters.

In: a model, a calibration text and a held-out text. Out: JSONL rows of two kinds, measured on held-out tokens, and tables.
``mlp_error``: relative squared error ||y^ - y||^2 / ||y||^2 of one block's output (without the bias of down) when the MLP, router
included, may cost ``budget`` of its dense multiply-adds or bytes, and its measured cost. ``rank_need``: the fraction of
components that hold 90 or 99 % of a token's energy, in the rank basis of a linear and, for ``down``, among neurons (paper, Figs.
2a, 2b).

    paper         rank adapters on up and gate, neuron adapter on down, split by grid search (Algorithm 2)
    teal, wina    input thresholds on every linear of the block, plain or weighted by column norms
    cats          threshold on the activated gate; the gate (without a gate: up) is computed in full
    neuron_ideal  neurons with |h_j| |W_:,j| above a threshold, by an oracle of no cost: a bound for predictors of neurons
    rana          the recipe for the linears of this block, the rest of the model dense; errors weighted by the model's loss
    rana_alone    the recipe for the MLP as a model of its own, so errors are weighted by the output error that is measured here,
                  as in the other recipes; only for an MLP that is a module with one input

``rana`` is solved for each block and budget separately, so that all recipes have the same budget for the same block.

    python -m bench.quality.mlp_error MODEL --calib calib.jsonl.xz --text valid.jsonl.xz --out bench/results/mlp-error-NAME.jsonl
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from bench.common.calibrated import Calibrated, batches_of, calibrate_once, counted_groups
from bench.common.record import append, start
from bench.quality.block_error import score
from bench.quality.rank_need import QUANTILES, rank_needs
from rana_fx.adapter import Adapter
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.layout import MlpBlock
from rana_fx.commands.record import show
from rana_fx.errors import BudgetUnreachable, NoLinears, TooFewTokens, TraceFailed
from rana_fx.evaluation.perplexity import load_model
from rana_fx.plan import METRICS
from rana_fx.recipes import RECIPES

# recipes have no public function for one block at one fraction: private steps are used
from rana_fx.recipes.baselines import _masked_sites, _threshold_block
from rana_fx.recipes.builders import neuron_adapter
from rana_fx.recipes.importance import importance_profile, neuron_threshold
from rana_fx.recipes.paper.recipe import _adapt_mlp, _bases
from rana_fx.recipes.problem import Problem

RECIPES_OF_BLOCKS = ("paper", "teal", "wina", "cats", "neuron_ideal", "rana", "rana_alone")
_NEURONS = ("teal", "wina", "cats")
_BATCHES = 16  # a block's rows as batches: two are held out, four used for gradients


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    text: Annotated[str, typer.Option(help="Held-out text.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    recipes: Annotated[str, typer.Option(help="Recipes, by commas.")] = ",".join(RECIPES_OF_BLOCKS),
    budgets: Annotated[str, typer.Option(help="Fractions of the MLP's dense cost, by commas.")] = "0.7,0.58,0.5",
    metric: Annotated[str, typer.Option(help="Metric of cost: flops (model in float32) or bytes (model in bfloat16).")] = "flops",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_000,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 4_096,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the token sample.")] = 0,
) -> None:
    """Error of MLP outputs per recipe, and components needed per input, on held-out text."""
    names = recipes.split(",")
    unknown = [name for name in names if name not in RECIPES_OF_BLOCKS]
    if unknown:
        raise typer.BadParameter(f"unknown recipes {unknown}: pick of {', '.join(RECIPES_OF_BLOCKS)}")
    if metric not in METRICS:
        raise typer.BadParameter(f"unknown metric {metric!r}: pick of {', '.join(METRICS)}")
    dtype = "float32" if metric == "flops" else "bfloat16"
    network, tokenizer = load_model(model, dtype=dtype)
    progress = sys.stderr.isatty()
    calibrated = calibrate_once(
        network, batches_of(calib, tokenizer, tokens=tokens, context=context), seed=seed, progress=progress
    )
    batches = batches_of(text, tokenizer, tokens=eval_tokens, context=context)
    held_out, count = held_out_samples(network, calibrated, batches, metric=metric, progress=progress)
    common = calibrated.head("mlp_error", model, calib, context=context, dtype=dtype)
    common |= {"text": Path(text).name, "tokens": count, "metric": metric}
    start(out)
    rows: list[dict[str, Any]] = []
    asked = [float(value) for value in budgets.split(",")]
    with torch.no_grad():
        for facts in itertools.chain(errors(network, calibrated, held_out, names, asked), rank_needs(calibrated, held_out)):
            append(out, common | facts)
            rows.append(facts)
    _tables(Path(model).name, rows)


def held_out_samples(
    network: nn.Module, calibrated: Calibrated, batches: Iterable[Any], *, metric: str, progress: bool
) -> tuple[Problem, int]:
    """(samples of a held-out text as a problem for ``errors``, number of its tokens)."""
    found = calibrate(network, batches, wanted=counted_groups, seed=calibrated.seed, progress=progress)
    return Problem(calibrated.layout, found.samples, 1.0, metric, "dense", progress=False), found.tokens


def errors(
    network: nn.Module, calibrated: Calibrated, held_out: Problem, names: Sequence[str], budgets: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Yield one row per block, budget and recipe."""
    for block in calibrated.layout.blocks:
        problem = calibrated.problem(budget=1.0, metric=held_out.metric, recipe="paper")
        alone = _alone(network, problem, block) if "rana_alone" in names else None
        rows = problem.rows(block.ups[0])
        bases = _bases(problem, [(up,) for up in block.ups], {}) if "paper" in names else []
        makers: dict[str, Callable[[float], list[Adapter] | None]] = {
            "paper": partial(_adapt_mlp, problem, block, rows, bases),
            "teal": partial(_inputs, problem, block, weighted=False),
            "wina": partial(_inputs, problem, block, weighted=True),
            "cats": partial(_cats, problem, block),
            "neuron_ideal": partial(_ideal, problem, block),
            "rana": partial(_rana, calibrated, block, held_out.metric),
            "rana_alone": partial(_rana_alone, alone, held_out.metric),
        }
        for budget, recipe in itertools.product(budgets, names):
            facts = {"kind": "mlp_error", "site": block.down, "recipe": recipe, "budget": budget}
            try:
                made = makers[recipe](budget)
            except (BudgetUnreachable, TooFewTokens) as error:
                yield facts | {"unreachable": str(error)}
                continue
            if made is None:
                why = "the MLP is not a module of its own" if recipe == "rana_alone" else "the dense part exceeds the budget"
                yield facts | {"unreachable": why}
                continue
            error, cost = score(held_out, block, made)
            of = "dense multiply-adds" if held_out.metric == "flops" else "dense bytes"
            if recipe == "neuron_ideal":
                # a dropped neuron costs nothing in up and gate either, and the selection is free
                (down,) = made
                cost = 1 - (1 - cost) * held_out.size(block.sites) / held_out.size((down.name,))
                of += " (choice of neurons not counted)"
            yield facts | {"error": error, "measured": cost, "measured_of": of}


def _rana(calibrated: Calibrated, block: MlpBlock, metric: str, fraction: float) -> list[Adapter]:
    layout = replace(
        calibrated.layout, sites={name: calibrated.layout.sites[name] for name in block.sites}, blocks=(block,), skips=()
    )
    problem = replace(calibrated, layout=layout).problem(budget=fraction, metric=metric, recipe="rana")
    return RECIPES["rana"].solve(problem)


def _rana_alone(alone: tuple[str, Calibrated] | None, metric: str, fraction: float) -> list[Adapter] | None:
    if alone is None:
        return None
    prefix, calibrated = alone
    made = RECIPES["rana"].solve(calibrated.problem(budget=fraction, metric=metric, recipe="rana"))
    return [replace(adapter, sites=tuple(prefix + site for site in adapter.sites)) for adapter in made]


def _alone(network: nn.Module, problem: Problem, block: MlpBlock) -> tuple[str, Calibrated] | None:
    """(prefix of the block's site names, its module calibrated on sampled inputs); None if it is not a module of its own."""
    parts = zip(*(name.split(".") for name in block.sites), strict=False)
    shared = ".".join(part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
    rows = problem.rows(block.ups[0])
    batches = [chunk.unsqueeze(0) for chunk in rows.split(-(-len(rows) // _BATCHES))]
    try:
        found = calibrate_once(network.get_submodule(shared), batches)
    except (AttributeError, NoLinears, TraceFailed):
        return None
    counted = {f"{shared}.{site.name}" for site in found.layout.sites.values() if site.counted}
    return (f"{shared}.", found) if counted == set(block.sites) else None


def _inputs(problem: Problem, block: MlpBlock, fraction: float, *, weighted: bool) -> list[Adapter]:
    adapters = []
    for name in block.sites:
        norms = torch.linalg.vector_norm(problem.matrix((name,)), dim=0)
        norms = norms if weighted else torch.ones_like(norms)
        threshold = neuron_threshold(importance_profile(problem.rows(name), norms), fraction)
        adapters.append(neuron_adapter(problem, name, threshold, norms, fraction))
    return adapters


def _cats(problem: Problem, block: MlpBlock, fraction: float) -> list[Adapter] | None:
    masked = _masked_sites(block)
    total, part = problem.flops(block.sites), problem.flops(masked)
    left = (fraction * total - (total - part)) / part
    return None if left <= 0 else [_threshold_block(problem, block, min(1.0, left))]


def _ideal(problem: Problem, block: MlpBlock, fraction: float) -> list[Adapter]:
    norms = torch.linalg.vector_norm(problem.matrix((block.down,)), dim=0)
    threshold = neuron_threshold(importance_profile(problem.rows(block.down), norms), fraction)
    return [neuron_adapter(problem, block.down, threshold, norms, fraction)]


def _tables(model: str, rows: list[dict[str, Any]]) -> None:
    errors: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "mlp_error":
            errors.setdefault((row["budget"], row["recipe"]), []).append(row)
    lines = []
    means: dict[tuple[float, str], float] = {}
    for (budget, recipe), found in errors.items():
        values = [row.get("error", float("nan")) for row in found]
        spent = sum(row.get("measured", float("nan")) for row in found) / len(found)
        means[budget, recipe] = sum(values) / len(values)
        lines.append((recipe, budget, spent, means[budget, recipe], min(values), max(values)))
    columns = ("recipe", "budget", "measured", "mean", "min", "max")
    show(f"{model}: relative squared error of MLP outputs over blocks", columns, lines, notes=_ratios(means))
    needs: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "rank_need":
            needs.setdefault((row["role"], row["basis"], row["energy"]), []).append(row)
    kept = ("mean", *(f"q{round(100 * q)}" for q in QUANTILES))
    table = [(*key, *(sum(row[c] for row in found) / len(found) for c in kept)) for key, found in needs.items()]
    show(f"{model}: fraction of components that hold a share of a token's energy", ("role", "basis", "energy", *kept), table)


def _ratios(means: dict[tuple[float, str], float]) -> Iterator[str]:
    """Ratios of mean errors, recipe rana over others, at the same budget."""
    for (budget, recipe), error in means.items():
        if recipe not in ("rana", "rana_alone"):
            continue
        neurons = [means[budget, name] for name in _NEURONS if means.get((budget, name), float("nan")) > 0]
        others = {"paper": means.get((budget, "paper")), "best neuron recipe": min(neurons, default=None)}
        for name, other in others.items():
            if other:
                yield f"{recipe} at {budget}: {error / other:.3f} of the error of {name}"


if __name__ == "__main__":
    typer.run(main)
