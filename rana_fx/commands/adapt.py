"""``rana-fx adapt``: a model and a text in, a plan on disk out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from rana_fx.commands import options as o
from rana_fx.commands.plan_table import show_plan
from rana_fx.commands.record import data_batches, facts_of, show, write_json


def command(
    model: o.Model,
    data: o.Data,
    out: Annotated[Path, typer.Option(callback=o.folder, help="Folder to write the plan to.")],
    budget: o.Budget = 0.58,
    metric: o.Metric = "flops",
    recipe: o.Recipe = "rana",
    scope: o.Scope = "blocks",
    tokens: o.Tokens = 32_000,
    context: o.Context = 512,
    batch_size: o.BatchSize = 8,
    column: o.Column = "text",
    split: o.Split = None,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    every_adapter: o.All = False,
    json: o.Json = None,
) -> None:
    """Calibrate MODEL on a text, distribute the budget over its linears, and write the resulting plan."""
    import torch

    from rana_fx.adaptation import adapt
    from rana_fx.evaluation.perplexity import load_model

    torch.manual_seed(seed)
    network, tokenizer = load_model(model, dtype=dtype, device=device)
    text = {"column": column, "split": split, "tokens": tokens, "context": context, "batch_size": batch_size}
    # neighbouring documents are similar: the first ones alone would be a biased sample of the text
    batches = data_batches(network, tokenizer, data, **text, shuffle=seed)  # type: ignore[arg-type]
    started = time.perf_counter()
    plan = adapt(network, batches, budget=budget, metric=metric, recipe=recipe, scope=scope, seed=seed)
    seconds = time.perf_counter() - started
    plan.save(out)
    facts = facts_of("adapt", seed=seed, model=model, data=data, out=out, dtype=dtype, device=str(network.device), **text)
    facts |= {
        "out": str(out),
        "digest": plan.digest(),
        "recipe": plan.recipe,
        "budget": {
            "asked": plan.budget,
            "metric": plan.metric,
            "scope": plan.scope,
            "expected": {"flops": plan.expected_budget("flops"), "bytes": plan.expected_budget("bytes")},
        },
        "tokens": plan.tokens,
        "seconds": seconds,
        "plan": plan.to_dict(),
    }
    show_plan(f"plan for {model}", plan, every_adapter=every_adapter)
    show(
        "adapted",
        ("", "value"),
        [
            ("recipe", plan.recipe),
            ("target budget", f"{plan.budget:g} of the dense {plan.metric}{', output head included' if scope == 'all' else ''}"),
            ("expected budget, flops", plan.expected_budget("flops")),
            ("expected budget, bytes", plan.expected_budget("bytes")),
            ("calibration tokens", plan.tokens),
            ("linears left dense or skipped", len(plan.left)),
            *(("note", text) for text in plan.notes()),
            ("seconds", seconds),
            ("seed", str(plan.seed)),
            ("digest", plan.digest()[:12]),
            ("written to", out),
        ],
    )
    write_json(json, facts)
