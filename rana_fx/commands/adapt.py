"""``rana-fx adapt``: a model and a text in, a plan on disk out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from rana_fx.commands import checks
from rana_fx.commands import options as o
from rana_fx.commands.plan_table import show_plan
from rana_fx.commands.record import cell, data_batches, facts_of, write_json
from rana_fx.commands.screen import LEGEND, Screen


def command(
    model: o.Model,
    data: o.Data,
    out: Annotated[Path, typer.Option(callback=checks.folder, help="Folder to write the plan to.")],
    budget: o.Budget = 0.58,
    metric: o.Metric = "flops",
    recipe: o.Recipe = "rana",
    scope: o.Scope = "blocks",
    skip: o.Skip = None,
    only: o.Only = None,
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
    config: o.Config = None,
    quiet: o.Quiet = False,
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
    chosen = {"budget": budget, "metric": metric, "recipe": recipe, "scope": scope, "seed": seed}
    patterns = {"skip": skip or (), "only": only or ()}
    plan = adapt(network, batches, **chosen, **patterns, progress=not quiet)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    plan.save(out)
    facts = facts_of("adapt", seed=seed, model=model, data=data, out=out, dtype=dtype, device=str(network.device), **text)
    facts["options"] |= {name: list(found) for name, found in patterns.items() if found}
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
    screen = Screen(quiet)
    show_plan(screen, f"plan for {model}", plan, every_adapter=every_adapter)
    of_what = f"of the dense {plan.metric}{', output head included' if scope == 'all' else ''}"
    expected = ", ".join(f"{name} {cell(plan.expected_budget(name))}" for name in ("flops", "bytes"))
    screen.lines(
        [
            f"recipe {plan.recipe}, budget {plan.budget:g} {of_what}; expected {expected}",
            f"{plan.tokens:,} calibration tokens, seed {plan.seed}, {seconds:.0f} seconds; {len(plan.left)} linears left dense",
            *LEGEND,
        ]
    )
    screen.lines([f"plan {plan.digest()[:12]} written to {out}"], whole=True)
    screen.next_steps(
        (f"rana-fx eval {model} --plan {out} --data TEXT", "what quality it costs"),
        (f"rana-fx explain {model} --plan {out}", "what it does, and where"),
        (f"rana-fx generate {model} --plan {out} --prompt TEXT", "run it"),
    )
    write_json(json, facts)
