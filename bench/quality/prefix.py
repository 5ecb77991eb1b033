"""Increase of the loss with the first positions of every sequence, or a prompt, left dense.

In: a model, a calibration text and a held-out text. Out: a JSONL row per budget and rule, and two tables; increases in nats over
the dense model. Rules:

    all        every token is adapted, as in ``bench.quality`` and in all published results
    first-N    the first 1, 4 or 16 positions of a sequence are dense
    prompt     the first half of a sequence is dense, as a prompt of that length with ``options={"prefill": "dense"}``

Dense positions also have the dense model's keys and values, since attention is causal. Increases are means over targets predicted
from any position (``delta``) and from the second half of a sequence (``second_half``), with bootstrap intervals over documents;
compare rules by the latter, where all rules adapt every token. ``cost``: mean cost of a token as a fraction of dense in the
budget's metric, dense positions included. For the rule ``all`` the second table has the increase by position.

    python -m bench.quality.prefix MODEL --calib calib.jsonl.xz --text held.jsonl.xz --out bench/results/prefix-NAME.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.common.calibrated import batches_of, calibrate_once
from bench.common.documents import Text, read_text
from bench.common.record import append, start
from bench.quality.divergence import interval
from rana_fx.calibration.holdout import Holdout
from rana_fx.calibration.instrumented import InstrumentedModel
from rana_fx.calibration.layout import Layout
from rana_fx.commands.record import show
from rana_fx.evaluation.perplexity import load_model
from rana_fx.plan import METRICS, Plan
from rana_fx.recipes import RECIPES
from rana_fx.recipes.simulate import AdapterSimulator

_FIRST = (1, 4, 16)
_EDGES = (0, 1, 4, 16, 64, 256)  # first position of each column of the second table


class FromPosition:
    """Simulates adapters at positions from ``dense`` on of every sequence. ``tokens``: (sequences, positions) of the batch."""

    def __init__(self, simulator: AdapterSimulator, tokens: tuple[int, int], dense: int) -> None:
        self._simulator, self._tokens, self._dense = simulator, tokens, dense

    def step(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """A step of ``InstrumentedModel.run``: the output of linear ``name`` with the first positions dense."""
        adapted = self._simulator.step(name, x, y)
        if self._dense == 0:
            return adapted
        rows, length = self._tokens
        mask = (torch.arange(length, device=y.device) < self._dense).repeat(rows)
        return torch.where(mask[:, None], y.reshape(len(mask), -1), adapted.reshape(len(mask), -1)).view(y.shape)


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    text: Annotated[str, typer.Option(help="Held-out text.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    budgets: Annotated[str, typer.Option(help="Budgets, by commas.")] = "0.58,0.4",
    recipe: Annotated[str, typer.Option(help="Recipe.")] = "rana",
    metric: Annotated[str, typer.Option(help="What the budgets count: flops, in float32, or bytes of bfloat16.")] = "flops",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_000,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 32_768,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the token sample.")] = 0,
) -> None:
    """Increase of the loss by the positions that are adapted."""
    if metric not in METRICS:
        raise typer.BadParameter(f"unknown metric {metric!r}: pick of {', '.join(METRICS)}")
    if recipe not in RECIPES:
        raise typer.BadParameter(f"unknown recipe {recipe!r}: pick of {', '.join(RECIPES)}")
    progress = sys.stderr.isatty()
    dtype = "float32" if metric == "flops" else "bfloat16"
    network, tokenizer = load_model(model, dtype=dtype)
    held = read_text(text, tokenizer, tokens=eval_tokens, context=context)
    batches = batches_of(calib, tokenizer, tokens=tokens, context=context)
    calibrated = calibrate_once(network, batches, seed=seed, progress=progress)
    common = calibrated.head("prefix", model, calib, context=context, dtype=dtype)
    common |= {"text": Path(text).name, "metric": metric, "recipe": recipe}
    start(out)
    rows: list[dict[str, Any]] = []
    rules = {"all": 0, **{f"first-{count}": count for count in _FIRST if count < context // 2}, "prompt": context // 2}
    for budget in (float(value) for value in budgets.split(",")):
        plan = calibrated.plan(budget=budget, metric=metric, recipe=recipe, progress=progress)
        for facts in measured(Holdout(network, (), ()), calibrated.layout, plan, held, rules, context):
            row = {"budget": budget, **facts}
            append(out, common | row)
            rows.append(row)
    _tables(f"{Path(model).name}, {recipe}, {metric}", rows)


@torch.no_grad()
def measured(
    holdout: Holdout, layout: Layout, plan: Plan, text: Text, rules: dict[str, int], context: int
) -> Iterator[dict[str, Any]]:
    """Yield the facts of every rule. ``rules``: number of dense positions by name."""
    places = torch.arange(context - 1)
    documents = torch.cat([part[:, 1:] for part in text.documents])
    with holdout.instrumented(layout) as model:
        dense = _losses(model, text, None, 0)
        for rule, leading in rules.items():
            simulator = AdapterSimulator(model, layout, plan.adapters)
            more = _losses(model, text, simulator, leading) - dense
            budget = plan.expected_budget(plan.metric, kept=simulator.kept())
            row = {"rule": rule, "dense_positions": leading, "measured": budget}
            row["cost"] = budget + (1 - budget) * leading / context
            for name, window in (("delta", places >= 0), ("second_half", places >= context // 2)):
                row[name], row[f"{name}_interval"] = _mean(more[:, window], documents[:, window])
            if leading == 0:
                edges = [edge for edge in _EDGES if edge < context - 1]
                windows = {
                    edge: (places >= edge) & (places < stop) for edge, stop in zip(edges, [*edges[1:], context], strict=True)
                }
                row["by_position"] = {str(edge): _mean(more[:, w], documents[:, w])[0] for edge, w in windows.items()}
            yield row


def _losses(model: InstrumentedModel, text: Text, simulator: AdapterSimulator | None, leading: int) -> Tensor:
    """Loss of every target, (sequences, context - 1), fp64; NaN where the target or the token before it is padding."""
    found = []
    for batch in text.batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert isinstance(ids, Tensor)
        assert isinstance(mask, Tensor)
        step = None if simulator is None else FromPosition(simulator, (ids.shape[0], ids.shape[1]), leading).step
        logits = model.run(batch, step).logits.float().cpu()
        if simulator is not None:
            simulator.clear()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").double()
        found.append(losses.masked_fill((mask[:, 1:] * mask[:, :-1]) == 0, torch.nan))
    return torch.cat(found)


def _mean(more: Tensor, documents: Tensor) -> tuple[float, tuple[float, float]]:
    """(mean, bootstrap interval over documents) of all values that are not NaN."""
    real = ~more.isnan()
    names, place = documents[real].unique(return_inverse=True)
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, place, more[real])
    return float(more[real].mean()), interval(sums, place.bincount().double())


def _tables(title: str, rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        low, high = row["second_half_interval"]
        lines.append((row["rule"], row["budget"], row["measured"], row["cost"], row["delta"], row["second_half"], low, high))
    columns = ("dense positions", "budget", "measured", "cost", "delta", "second half", "2.5 %", "97.5 %")
    show(f"{title}: increase of the loss by dense positions", columns, lines)
    whole = [row for row in rows if "by_position" in row]
    edges = [f"from {edge}" for edge in whole[0]["by_position"]]
    by_position = [(str(row["budget"]), *row["by_position"].values()) for row in whole]
    show(
        f"{title}: increase by position", ("budget", *edges), by_position, notes=["increase of the loss with all tokens adapted"]
    )


if __name__ == "__main__":
    typer.run(main)
