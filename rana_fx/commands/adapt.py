"""``rana-fx adapt``: a model and a text in, a plan on disk out; with ``--budgets`` several, with a target the cheapest one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rana_fx.commands import options as o
from rana_fx.commands.curve_table import show_curve
from rana_fx.commands.plan_table import show_plan
from rana_fx.commands.record import data_batches, data_texts, facts_of, show, write_json
from rana_fx.errors import InvalidOption

if TYPE_CHECKING:
    from rana_fx.plan import Plan


def command(
    context_: typer.Context,
    model: o.Model,
    data: o.Data,
    out: Annotated[Path, typer.Option(callback=o.folder, help="Folder to write the plan to; with --budgets one in it for each.")],
    budget: o.Budget = 0.58,
    budgets: o.Budgets = None,
    max_kl: o.MaxKl = None,
    max_loss: o.MaxLoss = None,
    max_ppl_increase: o.MaxPplIncrease = None,
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
    from rana_fx.commands.held_out_text import calibration_and_held_out
    from rana_fx.evaluation.perplexity import load_model
    from rana_fx.measured_plans import asked_of

    targets = {"max_kl": max_kl, "max_loss": max_loss, "max_ppl_increase": max_ppl_increase}
    asked: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    if budgets is not None:
        asked["budgets"] = _numbers(budgets)
    if not asked or _is_given(context_, "budget"):
        asked["budget"] = budget
    # before the model, so that a wrong option fails fast
    measured = asked_of(asked.get("budget"), asked.get("budgets"), targets).measured
    torch.manual_seed(seed)
    network, tokenizer = load_model(model, dtype=dtype, device=device)
    text = {"column": column, "split": split, "tokens": tokens, "context": context, "batch_size": batch_size}
    # neighbouring documents are similar: the first ones alone would be a biased sample of the text
    if measured:
        texts = data_texts(network, data, column=column, split=split, tokens=tokens, context=context, shuffle=seed)
        batches, held_out = calibration_and_held_out(texts, tokenizer, tokens=tokens, context=context, batch_size=batch_size)
        asked["held_out"] = held_out
    else:
        batches = data_batches(network, tokenizer, data, **text, shuffle=seed)  # type: ignore[arg-type]
    started = time.perf_counter()
    found: Plan | list[Plan] = adapt(network, batches, **asked, metric=metric, recipe=recipe, scope=scope, seed=seed)
    seconds = time.perf_counter() - started
    facts = facts_of("adapt", seed=seed, model=model, data=data, out=out, dtype=dtype, device=str(network.device), **text)
    if isinstance(found, list):
        plans = [(plan, out / f"{plan.budget:g}") for plan in found]
        facts |= {"out": str(out), "seconds": seconds, "plans": [_facts(plan, folder) for plan, folder in plans]}
    else:
        plans = [(found, out)]
        facts |= {"seconds": seconds} | _facts(found, out)
    for plan, folder in plans:
        plan.save(folder)
        show_plan(f"plan for {model}", plan, every_adapter=every_adapter)
        _show_facts(plan, folder, seconds)
    curve = plans[0][0].curve
    if curve is not None:
        show_curve(curve)
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


def _show_facts(plan: Plan, out: Path, seconds: float) -> None:
    measured = [] if plan.curve is None else plan.curve.lines(plan.budget)
    show(
        "adapted",
        ("", "value"),
        [
            ("recipe", plan.recipe),
            (
                "target budget",
                f"{plan.budget:g} of the dense {plan.metric}{', output head included' if plan.scope == 'all' else ''}",
            ),
            ("expected budget, flops", plan.expected_budget("flops")),
            ("expected budget, bytes", plan.expected_budget("bytes")),
            *(("measured", text) for text in measured),
            ("calibration tokens", plan.tokens),
            ("linears left dense or skipped", len(plan.left)),
            *(("note", text) for text in plan.notes()),
            ("seconds", seconds),
            ("seed", str(plan.seed)),
            ("digest", plan.digest()[:12]),
            ("written to", out),
        ],
    )


def _numbers(text: str) -> list[float]:
    """Of a list with commas. Raises InvalidOption."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidOption(name="--budgets", got=text, expected="numbers with commas, such as 0.3,0.5,0.7") from None


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, not defaulted."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
