"""``rana-fx demo``: the embedded model, adapted, compiled and compared with the dense one; no network needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rana_fx.commands import options as o
from rana_fx.commands.plan_table import show_plan
from rana_fx.commands.record import facts_of, write_json
from rana_fx.commands.screen import LEGEND, Screen

if TYPE_CHECKING:
    from rana_fx.plan import Plan

_TEXT_LINES = 4  # of each of the two continuations


def command(
    budget: o.Budget = 0.58,
    metric: o.Metric = "flops",
    recipe: o.Recipe = "rana",
    tokens: o.Tokens = 32_000,
    context: o.Context = 512,
    batch_size: o.BatchSize = 8,
    max_new_tokens: o.NewTokens = 64,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    every_adapter: o.All = False,
    json: o.Json = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Adapt, compile and run the language model that ships with rana_fx. Takes a few minutes on two CPU cores."""
    from rana_fx.commands import demo_run

    options = {
        "budget": budget,
        "metric": metric,
        "recipe": recipe,
        "tokens": tokens,
        "context": context,
        "batch_size": batch_size,
    }
    facts = facts_of("demo", seed=seed, **options, max_new_tokens=max_new_tokens, dtype=dtype, device=device)
    chosen = demo_run.Options(**options, max_new_tokens=max_new_tokens, seed=seed, device=device, dtype=dtype)  # type: ignore[arg-type]
    screen = Screen(quiet)
    made, plan = demo_run.run(chosen, progress=not quiet, report=lambda line: screen.lines([line]))
    facts |= made
    show(screen, facts, plan, every_adapter=every_adapter)
    write_json(json, facts)


def show(screen: Screen, facts: dict[str, Any], plan: Plan, *, every_adapter: bool) -> None:
    """Print the two texts, the plan in ten lines or by adapter, the comparison, the result in words, and what to do next."""
    from rana_fx.commands import demo_run

    for name in ("dense", "adapted"):
        generated = facts["generation"]
        screen.wrapped(f"{name}: {generated['prompt']}{generated[name]['text']}", indent="  ", most=_TEXT_LINES)
    if every_adapter:
        show_plan(screen, "plan", plan, every_adapter=True)
    else:
        screen.lines(str(plan).splitlines())
    title = f"{facts['model']} on {facts['device']}, {facts['dtype']}; dense by Inductor, adapted by rana"
    screen.summary(title, ("", "dense", "adapted", "ratio"), _rows(facts))
    screen.wrapped(demo_run.gain(facts), indent="  ")
    if facts["device"] != "cpu":
        screen.wrapped(facts["note"], indent="  ")
    screen.lines(LEGEND)
    screen.next_steps(("rana-fx sweep MODEL --data TEXT", "your own: which budget, what it costs"))


def _rows(facts: dict[str, Any]) -> list[tuple[object, ...]]:
    dense, adapted = facts["quality"]["dense"], facts["quality"]["adapted"]
    fast, slow = facts["generation"]["adapted"], facts["generation"]["dense"]
    measured = facts["budget"]["measured"]
    times = slow["ms_per_token"], fast["ms_per_token"]
    return [
        ("perplexity, held-out text", dense["perplexity"], adapted["perplexity"], facts["perplexity_ratio"]),
        ("mean loss, nats per token", dense["mean_loss"], adapted["mean_loss"], None),
        ("measured cost of linears, flops", 1.0, measured["flops"], measured["flops"]),
        ("measured cost of linears, bytes", 1.0, measured["bytes"], measured["bytes"]),
        ("ms per decoded token, median", *times, _over(times[1], times[0])),
        ("compilation, seconds", slow["compile_seconds"], fast["compile_seconds"], None),
        ("calibration and plan, seconds", None, facts["adapt_seconds"], None),
        ("total, seconds", None, facts["seconds"], None),
    ]


def _over(adapted: float | None, dense: float | None) -> float | None:
    return adapted / dense if adapted and dense else None
