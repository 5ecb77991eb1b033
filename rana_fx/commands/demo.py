"""``rana-fx demo``: the embedded model, adapted, compiled and compared with the dense one; no network needed."""

from __future__ import annotations

from typing import Any

from rana_fx.commands import options as o
from rana_fx.commands.plan_table import show_plan
from rana_fx.commands.record import facts_of, write_json
from rana_fx.commands.screen import Screen


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
    made, plan = demo_run.run(chosen, progress=not quiet, report=lambda line: screen.lines([line], whole=True))
    facts |= made
    for name in ("dense", "adapted"):
        screen.lines([f"{name}: {facts['generation']['prompt']}{facts['generation'][name]['text']}"], whole=True)
    show_plan(screen, "plan", plan, every_adapter=every_adapter)
    title = f"{facts['model']} on {facts['device']}, {facts['dtype']}"
    screen.table(title, ("", "dense", "adapted", "ratio"), _rows(facts), notes=[facts["note"], demo_run.gain(facts)])
    write_json(json, facts)


def _rows(facts: dict[str, Any]) -> list[tuple[object, ...]]:
    dense, adapted = facts["quality"]["dense"], facts["quality"]["adapted"]
    fast, slow = facts["generation"]["adapted"], facts["generation"]["dense"]
    budget = facts["budget"]
    return [
        ("perplexity, held-out text", dense["perplexity"], adapted["perplexity"], facts["perplexity_ratio"]),
        ("mean loss, nats per token", dense["mean_loss"], adapted["mean_loss"], None),
        ("tokens predicted", dense["tokens"], adapted["tokens"], None),
        (f"target cost of linears, {budget['metric']}", 1.0, budget["asked"], budget["asked"]),
        ("measured cost of linears, flops", 1.0, budget["measured"]["flops"], budget["measured"]["flops"]),
        ("measured cost of linears, bytes", 1.0, budget["measured"]["bytes"], budget["measured"]["bytes"]),
        ("compiled by", "inductor", f"rana, recipe {facts['recipe']}", None),
        ("compilation, seconds", slow["compile_seconds"], fast["compile_seconds"], None),
        (
            "ms per decoded token, median",
            slow["ms_per_token"],
            fast["ms_per_token"],
            _over(fast["ms_per_token"], slow["ms_per_token"]),
        ),
        ("calibration and plan, seconds", None, facts["adapt_seconds"], None),
        ("total, seconds", None, facts["seconds"], None),
    ]


def _over(adapted: float | None, dense: float | None) -> float | None:
    return adapted / dense if adapted and dense else None
