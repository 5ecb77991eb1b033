"""``rana-fx adapt``: a model and a text in, a plan on disk out; with ``--budgets`` several, with a target the cheapest one."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rana_fx.asked import Asked, asked_of
from rana_fx.commands import checks
from rana_fx.commands import options as o
from rana_fx.commands.curve_table import show_curve
from rana_fx.commands.plan_table import show_plan
from rana_fx.commands.record import cell, data_texts, facts_of, write_json
from rana_fx.commands.screen import LEGEND, Screen
from rana_fx.summary import COLUMNS

if TYPE_CHECKING:
    from rana_fx.plan import Plan

_TARGETS = ("max_kl", "max_loss", "max_ppl_increase")


def command(
    context_: typer.Context,
    model: o.Model,
    data: o.Data,
    out: Annotated[
        Path, typer.Option(callback=checks.folder, help="Folder to write the plan to; with --budgets one in it for each.")
    ],
    budget: o.Budget = 0.58,
    budgets: o.Budgets = None,
    max_kl: o.MaxKl = None,
    max_loss: o.MaxLoss = None,
    max_ppl_increase: o.MaxPplIncrease = None,
    metric: o.Metric = "flops",
    recipe: o.Recipe = "rana",
    scope: o.Scope = "blocks",
    skip: o.Skip = None,
    only: o.Only = None,
    refine: o.Refine = None,
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
    several = None if budgets is None else checks.numbers("--budgets", budgets)
    targets = {"max_kl": max_kl, "max_loss": max_loss, "max_ppl_increase": max_ppl_increase}
    given = _given(context_, {"budget": budget, "budgets": several, **targets})
    asked = asked_of(given.get("budget"), given.get("budgets"), {name: given.get(name) for name in _TARGETS})
    if asked.measured:
        checks.recipe_with_budgets(recipe)
    if refine is not None:
        checks.recipe_to_refine(recipe)

    import torch

    from rana_fx.adaptation import adapt
    from rana_fx.commands.held_out_text import calibration_and_held_out, refinement_batches
    from rana_fx.evaluation.perplexity import load_model
    from rana_fx.evaluation.text import token_batches
    from rana_fx.refinement import Refine

    torch.manual_seed(seed)
    network, tokenizer = load_model(model, dtype=dtype, device=device)
    text = {"column": column, "split": split, "tokens": tokens, "context": context, "batch_size": batch_size}
    # neighbouring documents are similar: the first ones alone would be a biased sample of the text
    texts = data_texts(network, data, column=column, split=split, tokens=tokens, context=context, shuffle=seed)
    sizes = {"context": context, "batch_size": batch_size}
    held_out = None
    if asked.measured:
        batches, held_out = calibration_and_held_out(texts, tokenizer, tokens=tokens, **sizes)
    else:
        batches = token_batches(texts, tokenizer, tokens=tokens, **sizes)
    started = time.perf_counter()
    patterns = {"skip": skip or (), "only": only or ()}
    chosen: dict[str, Any] = {"metric": metric, "recipe": recipe, "scope": scope, "seed": seed, "held_out": held_out, **patterns}
    if refine is not None:
        others = refinement_batches(texts, tokenizer, after=tokens, tokens=refine, measured=asked.measured, **sizes)
        chosen["refine"] = Refine(tokens=refine, text=others)
    found: Plan | list[Plan] = adapt(network, batches, **given, **chosen, progress=not quiet)
    seconds = time.perf_counter() - started
    facts = facts_of("adapt", seed=seed, model=model, data=data, out=out, dtype=dtype, device=str(network.device), **text)
    facts["options"] |= {name: list(value) for name, value in patterns.items() if value} | {"refine": refine}
    screen = Screen(quiet)
    if isinstance(found, list):
        plans = [(plan, out / f"{plan.budget:g}") for plan in found]
        facts |= {"out": str(out), "seconds": seconds, "plans": [_facts(plan, folder) for plan, folder in plans]}
    else:
        plans = [(found, out)]
        facts |= {"seconds": seconds} | _facts(found, out)
    for plan, folder in plans:
        plan.save(folder)
        if not asked.many or every_adapter:
            show_plan(screen, f"plan for {model}", plan, every_adapter=every_adapter)
    _show_facts(screen, plans, seconds, asked)
    curve = plans[0][0].curve
    if curve is not None and (asked.many or every_adapter):
        show_curve(screen, curve)
    best = out / "PLAN" if asked.many else out
    screen.next_steps(
        (f"rana-fx eval {model} --plan {best} --data TEXT", "what quality it costs"),
        (f"rana-fx explain {model} --plan {best}", "what it does, and where"),
        (f"rana-fx generate {model} --plan {best} --prompt TEXT", "run it"),
    )
    write_json(json, facts)


def _facts(plan: Plan, out: Path) -> dict[str, Any]:
    expected = {"flops": plan.expected_budget("flops"), "bytes": plan.expected_budget("bytes")}
    return {
        "out": str(out),
        "digest": plan.digest(),
        "recipe": plan.recipe,
        "budget": {"asked": plan.budget, "metric": plan.metric, "scope": plan.scope, "expected": expected},
        "tokens": plan.tokens,
        "plan": plan.to_dict(),
    }


def _show_facts(screen: Screen, plans: list[tuple[Plan, Path]], seconds: float, asked: Asked) -> None:
    plan, out = plans[0]
    of_what = f"of the dense {plan.metric}{', output head included' if plan.scope == 'all' else ''}"
    what = f"budgets {', '.join(f'{one.budget:g}' for one, _ in plans)}" if asked.many else f"budget {plan.budget:.4g}"
    if not asked.many:
        of_what += "; expected " + ", ".join(f"{name} {cell(plan.expected_budget(name))}" for name in ("flops", "bytes"))
    left = "" if asked.many else f"; {len(plan.left)} linears left dense"
    measured = [] if plan.curve is None or asked.many else plan.curve.lines(plan.budget)
    screen.lines(
        [
            f"recipe {plan.recipe}, {what} {of_what}",
            f"{plan.tokens:,} calibration tokens, seed {plan.seed}, {seconds:.0f} seconds{left}",
            *(line for text in measured for line in textwrap.wrap(text, COLUMNS, subsequent_indent="  ")),
            *LEGEND,
        ]
    )
    written = [f"plan {one.digest()[:12]} written to {folder}" for one, folder in plans]
    screen.lines(written, whole=True)


def _given(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of these options that are given: on the command line, or if none of them is, in the file of --config."""
    for wanted in ("COMMANDLINE", "DEFAULT_MAP"):
        sources = {name: context.get_parameter_source(name) for name in values}
        found = {name: values[name] for name, source in sources.items() if source is not None and source.name == wanted}
        if found:
            return found
    return {}
