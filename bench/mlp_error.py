"""Error of MLP outputs per recipe, and how few ranks an input needs: the paper's comparison with neuron adapters.

In: a model, a calibration text and a held-out text. Out: JSONL rows of two kinds, all measured on held-out rows.
``mlp_error``: ||y^ - y||^2 / ||y||^2 of one block's output (biases of down left out) when the whole MLP, router included, may
cost ``budget`` of its dense multiply-adds. ``rank_need``: the fraction of components that hold 90 or 99 % of a token's
energy, in the rank basis of a linear and, for ``down``, among the neurons (paper, Figs. 2a, 2b).

    paper         rank adapters on up and gate, neuron adapter on down, split by grid search (Algorithm 2)
    teal, wina    input thresholds on every linear of the block, plain or weighted by column norms
    cats          threshold on the activated gate; the gate itself (without a gate: up) is paid in full
    neuron_ideal  neurons with |h_j| |W_:,j| above a threshold, known without computing them: a bound for predictors of neurons
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import linear

from bench.once import Calibrated, batches_of, calibrate_once
from bench.record import append, head, start
from rana_fx.adapters import Adapter
from rana_fx.calibrate import calibrate
from rana_fx.commands.record import show
from rana_fx.decompose import importance_profile, neuron_threshold, output_basis, second_moment
from rana_fx.evaluate import load_model
from rana_fx.kernels.reference import masked_gemv
from rana_fx.layout import MlpBlock

# one block at one fraction is no entry point of a recipe: the sweep takes the steps behind it
from rana_fx.recipes.baselines import _masked_sites, _threshold_block
from rana_fx.recipes.paper import _adapt_mlp
from rana_fx.recipes.problem import Problem

_SHARES = (0.9, 0.99)
_QUANTILES = (0.1, 0.5, 0.9)
_ROWS = 1024  # at a time


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    text: Annotated[str, typer.Option(help="Held-out text.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    budgets: Annotated[str, typer.Option(help="Fractions of the MLP's dense cost, by commas.")] = "0.7,0.58,0.5",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_000,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 4_096,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the token sample.")] = 0,
) -> None:
    """MLP output error per recipe, and ranks needed per input, on held-out text."""
    network, tokenizer = load_model(model, dtype="float32")
    progress = sys.stderr.isatty()
    calibrated = calibrate_once(
        network, batches_of(calib, tokenizer, tokens=tokens, context=context), seed=seed, progress=progress
    )
    batches = batches_of(text, tokenizer, tokens=eval_tokens, context=context)
    groups = {calibrated.layout.groups[site.group].sites for site in calibrated.layout.sites.values() if site.counted}
    _, held, count = calibrate(network, batches, wanted=lambda _: groups, seed=seed, progress=progress)
    common = head("mlp_error") | {
        "model": Path(model).name,
        "calibration": Path(calib).name,
        "calibration_tokens": calibrated.tokens,
        "text": Path(text).name,
        "tokens": count,
        "context": context,
        "dtype": "float32",
        "seed": seed,
    }
    start(out)
    rows: list[dict[str, Any]] = []
    held_out = Problem(calibrated.layout, held, 1.0, "flops", "dense", progress=False)
    with torch.no_grad():
        for facts in (*_errors(calibrated, held_out, budgets), *_needs(calibrated, held_out)):
            append(out, common | facts)
            rows.append(facts)
    _tables(Path(model).name, rows)


def _errors(calibrated: Calibrated, held_out: Problem, budgets: str) -> list[dict[str, Any]]:
    found = []
    for budget in (float(value) for value in budgets.split(",")):
        problem = calibrated.problem(budget=budget, metric="flops", recipe="paper")
        for block in calibrated.layout.blocks:
            rows = problem.rows(block.ups[0])
            moment = second_moment(rows)
            made_by: dict[str, list[Adapter] | None] = {
                "paper": _adapt_mlp(problem, block, rows, moment, budget),
                "teal": _inputs(problem, block, budget, weighted=False),
                "wina": _inputs(problem, block, budget, weighted=True),
                "cats": _cats(problem, block, budget),
                "neuron_ideal": _ideal(problem, block, budget),
            }
            for recipe, made in made_by.items():
                facts = {"kind": "mlp_error", "site": block.down, "recipe": recipe, "budget": budget}
                if made is None:
                    found.append(facts | {"unreachable": "what stays dense costs more than the budget"})
                else:
                    error, cost = _score(held_out, block, {adapter.name: adapter for adapter in made})
                    free = " (choice of neurons not counted)" if recipe == "neuron_ideal" else ""
                    found.append(facts | {"error": error, "measured": cost, "measured_of": f"dense multiply-adds{free}"})
    return found


def _inputs(problem: Problem, block: MlpBlock, fraction: float, *, weighted: bool) -> list[Adapter]:
    adapters = []
    for name in block.sites:
        norms = torch.linalg.vector_norm(problem.matrix((name,)), dim=0)
        norms = norms if weighted else torch.ones_like(norms)
        threshold = neuron_threshold(importance_profile(problem.rows(name), norms), fraction)
        adapters.append(problem.neuron_adapter(name, threshold, norms, fraction))
    return adapters


def _cats(problem: Problem, block: MlpBlock, fraction: float) -> list[Adapter] | None:
    masked = _masked_sites(block)
    total, part = problem.flops(block.sites), problem.flops(masked)
    left = (fraction * total - (total - part)) / part
    return None if left <= 0 else [_threshold_block(problem, block, masked, min(1.0, left))]


def _ideal(problem: Problem, block: MlpBlock, fraction: float) -> list[Adapter]:
    norms = torch.linalg.vector_norm(problem.matrix((block.down,)), dim=0)
    threshold = neuron_threshold(importance_profile(problem.rows(block.down), norms), fraction)
    return [problem.neuron_adapter(block.down, threshold, norms, fraction)]


def _score(held_out: Problem, block: MlpBlock, adapters: dict[str, Adapter]) -> tuple[float, float]:
    """(relative error, measured cost over dense) on the held-out rows."""
    down_FO = held_out.matrix((block.down,)).t()
    energy = error = 0.0
    kept: dict[str, float] = {}
    rows = held_out.rows(block.ups[0])
    adapters = {name: adapter.on(rows.device) for name, adapter in adapters.items()}
    for x_TI in rows.float().split(_ROWS):
        outs = [_up(held_out, up, adapters.get(up), x_TI, kept) for up in block.ups]
        hidden = block.pointwise(*outs).float()
        last = adapters[block.down]
        if last.kind == "gated":
            assert block.activation is not None
            mask = block.activation(outs[block.gate]).float().square() >= last.tau
        else:
            mask = hidden.square() >= last.tau
        kept[block.down] = kept.get(block.down, 0.0) + float(mask.sum())
        y_TO = held_out.dense_rows(block, x_TI) @ down_FO
        energy += float(y_TO.square().sum(dtype=torch.float64))
        error += float(((hidden * mask) @ down_FO - y_TO).square().sum(dtype=torch.float64))
    mean = {name: value / len(rows) for name, value in kept.items()}
    return error / max(energy, 1e-30), _cost(held_out, block, adapters, mean)


def _up(held_out: Problem, name: str, adapter: Adapter | None, x_TI: Tensor, kept: dict[str, float]) -> Tensor:
    weight, bias = held_out.matrix((name,)), held_out.bias((name,))
    if adapter is None:
        return linear(x_TI, weight, bias)
    v = x_TI if adapter.router is None else linear(x_TI, adapter.router)
    kept[name] = kept.get(name, 0.0) + float((v.square() >= adapter.tau).sum())
    return masked_gemv(v, adapter.tau, weight.t() if adapter.weight is None else adapter.weight, bias)


def _cost(held_out: Problem, block: MlpBlock, adapters: dict[str, Adapter], mean: dict[str, float]) -> float:
    total = held_out.flops(block.sites)
    if set(adapters) == {block.down} and adapters[block.down].kind == "neuron":  # neuron_ideal: all rows of a neuron go
        return mean[block.down] / adapters[block.down].ranks
    changed = sum(adapter.cost("flops", mean[name]) - adapter.dense_flops for name, adapter in adapters.items())
    return (total + changed) / total


def _needs(calibrated: Calibrated, held_out: Problem) -> list[dict[str, Any]]:
    layout = calibrated.layout
    problem = calibrated.problem(budget=1.0, metric="flops", recipe="paper")
    stacks = [("attention_in", stack) for stack in layout.stacks()]
    ups = [("up", (up,)) for block in layout.blocks for up in block.ups]
    found = []
    for role, names in (*stacks, *ups):
        basis = output_basis(problem.matrix(names), second_moment(problem.rows(names[0])))
        chunks = held_out.rows(names[0]).float().split(_ROWS)
        found += _need(role, "+".join(names), "rank", [(chunk @ basis.b_DI.t()).square() for chunk in chunks])
    for block in layout.blocks:
        norms = torch.linalg.vector_norm(problem.matrix((block.down,)), dim=0)
        chunks = held_out.rows(block.down).float().split(_ROWS)
        found += _need("down", block.down, "neuron", [(chunk * norms).square() for chunk in chunks])
    return found


def _need(role: str, site: str, basis: str, energies: list[Tensor]) -> list[dict[str, Any]]:
    found = []
    for share in _SHARES:
        needed = []
        for energy_TD in energies:
            above = energy_TD.double().sort(dim=1, descending=True).values.cumsum(1)
            counts = (above < share * above[:, -1:]).sum(1) + 1
            needed.append(counts.double() / energy_TD.shape[1])
        fractions = torch.cat(needed).cpu()
        quantiles = torch.quantile(fractions, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
        names = [f"q{round(100 * q)}" for q in _QUANTILES]
        facts = {"kind": "rank_need", "role": role, "site": site, "basis": basis, "energy": share}
        found.append(facts | {"mean": float(fractions.mean())} | dict(zip(names, quantiles, strict=True)))
    return found


def _tables(model: str, rows: list[dict[str, Any]]) -> None:
    errors: dict[tuple[float, str], list[float]] = {}
    for row in rows:
        if row["kind"] == "mlp_error":
            errors.setdefault((row["budget"], row["recipe"]), []).append(row.get("error", float("nan")))
    lines = [(recipe, budget, sum(found) / len(found), min(found), max(found)) for (budget, recipe), found in errors.items()]
    show(f"{model}: relative error of MLP outputs over blocks", ("recipe", "budget", "mean", "least", "largest"), lines)
    needs: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "rank_need":
            needs.setdefault((row["role"], row["basis"], row["energy"]), []).append(row)
    columns = ("mean", *(f"q{round(100 * q)}" for q in _QUANTILES))
    table = [(*key, *(sum(row[c] for row in found) / len(found) for c in columns)) for key, found in needs.items()]
    show(f"{model}: fraction of components for a share of a token's energy", ("role", "basis", "energy", *columns), table)


if __name__ == "__main__":
    typer.run(main)
