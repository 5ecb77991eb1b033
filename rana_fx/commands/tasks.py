"""``rana-fx tasks``: scores of a model on downstream tasks, dense or, with a plan, adapted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from rana_fx.commands import options as o
from rana_fx.commands.record import facts_of, write_json
from rana_fx.commands.screen import Screen
from rana_fx.errors import InvalidOption

ROWS = 30  # of the table, by default
_ERROR = "_stderr"
_LEGEND = ("score: acc is a fraction of questions; acc_norm divides by the length of an answer.",)
Scores = Mapping[str, Mapping[str, float]]  # by task and metric


def command(
    model: o.Model,
    tasks: Annotated[str, typer.Option(help="Task names of lm_eval, separated by commas; paper: the six of the paper.")],
    plan: o.PlanDir = None,
    shots: Annotated[
        int | None, typer.Option(min=0, max=o.MOST, help="Worked examples before a question. Default: the task's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=o.MOST, help="Maximum number of documents of each task.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of further tasks, in lm_eval's YAML.")] = None,
    compile: Annotated[
        bool, typer.Option(help="Compile the adapted model; --no-compile: without Inductor, slower calls.")
    ] = True,
    prefill: o.Prefill = "masked",
    batch_size: o.BatchSize = 8,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    every_metric: Annotated[bool, typer.Option("--all", help="Every score, however many there are.")] = False,
    json: o.Json = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Scores of MODEL on tasks of lm-evaluation-harness; with --plan those of the adapted model."""
    if not 0 <= seed < 2**32:
        raise InvalidOption(name="--seed", got=seed, expected="a number of 32 bits that is not negative, as lm_eval takes them")
    from rana_fx.commands.loading import dtype_for
    from rana_fx.integrations.lm_eval_harness import RanaLM, language_model, run_tasks
    from rana_fx.plan import load_plan

    if plan is not None:
        loaded = load_plan(plan)
        dtype = dtype_for(loaded, dtype)
    options = {"batch_size": batch_size, "dtype": dtype, "device": device}
    made = language_model(model, plan=plan, compile=compile, prefill=prefill, **options)
    scores = run_tasks(made, tasks.split(","), shots=shots, limit=limit, include=include, seed=seed)
    facts = facts_of(
        "tasks", seed=seed, model=model, plan=plan, tasks=tasks, shots=shots, limit=limit, include=include, compile=compile,
        prefill=prefill, batch_size=batch_size, dtype=dtype, device=str(made.device),
    )  # fmt: skip
    adapted = made.plan if isinstance(made, RanaLM) else None
    facts |= {
        "scores": scores,
        "recipe": None if adapted is None else adapted.recipe,
        "budget": None if adapted is None else {"asked": adapted.budget, "metric": adapted.metric},
        "digest": None if adapted is None else adapted.digest(),
    }
    screen = Screen(quiet)
    what = "dense" if adapted is None else f"plan {adapted.digest()[:12]}"
    columns, rows, left_out = table(scores, every=every_metric)
    screen.summary(f"{model}, {what}", columns, rows)
    if left_out:
        screen.lines([f"{left_out} more scores: --all prints them, --json FILE has them as well"])
    screen.lines(_LEGEND)
    words = f"rana-fx tasks {model} --tasks {tasks}"
    if plan is None:
        screen.next_steps((f"{words} --plan PLAN", "the same of an adapted model"))
    else:
        screen.next_steps((words, "the same of the dense model"))
    write_json(json, facts)


def table(scores: Scores, *, every: bool) -> tuple[tuple[str, ...], list[tuple[object, ...]], int]:
    """(columns, rows, scores left out): all scores where they fit on a screen or ``every`` is asked for.

    Otherwise the first metric of each task, and of too many tasks the first ones: of a group lm_eval has the mean first.
    """
    rows: list[tuple[object, ...]] = [
        (task, metric, value, values.get(f"{metric}{_ERROR}"))
        for task, values in scores.items()
        for metric, value in values.items()
        if not metric.endswith(_ERROR)
    ]
    shown = rows
    if not every and len(rows) > ROWS:
        firsts: dict[object, tuple[object, ...]] = {}
        for row in rows:
            firsts.setdefault(row[0], row)
        shown = list(firsts.values())[:ROWS]
    return ("task", "metric", "score", "standard error"), shown, len(rows) - len(shown)
