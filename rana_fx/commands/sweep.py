"""``rana-fx sweep``: one calibration, a plan for each of several budgets, what each costs and loses, and which one to take."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rana_fx.commands import checks, config_file, sweep_plot
from rana_fx.commands import options as o
from rana_fx.commands.curve_table import AT_MOST
from rana_fx.commands.record import data_texts, facts_of, write_json
from rana_fx.commands.screen import Screen
from rana_fx.curve import CurvePoint, Interval
from rana_fx.knee import knee
from rana_fx.summary import COLUMNS

if TYPE_CHECKING:
    from rana_fx.plan import Plan

BUDGETS = "0.8,0.7,0.6,0.5,0.4"
_MEASURES = {"loss": "increase of the loss, nats a token", "kl": "KL divergence from dense, nats a token"}
_FIGURE = "sweep.png"
_REMARKS = 4  # that are printed
Times = tuple[list[float], float]  # ms of a token by plan, and of the dense model


def command(
    model: o.Model,
    data: o.Data,
    out: Annotated[Path, typer.Option(callback=checks.folder, help="Folder for the plans, one in it for each budget.")] = Path(
        "plans"
    ),
    budgets: Annotated[
        str, typer.Option(help="Budgets to make plans of.", metavar=config_file.NUMBERS, callback=checks.needed_budgets)
    ] = BUDGETS,
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
    json: o.Json = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Plans of MODEL for several budgets of one calibration: a table, a figure, and the budget to take."""
    checks.recipe_with_budgets(recipe)

    import torch

    from rana_fx.adaptation import adapt
    from rana_fx.commands.held_out_text import calibration_and_held_out
    from rana_fx.evaluation.perplexity import load_model

    torch.manual_seed(seed)
    network, tokenizer = load_model(model, dtype=dtype, device=device)
    texts = data_texts(network, data, column=column, split=split, tokens=tokens, context=context, shuffle=seed)
    batches, held_out = calibration_and_held_out(texts, tokenizer, tokens=tokens, context=context, batch_size=batch_size)
    chosen: dict[str, Any] = {"metric": metric, "recipe": recipe, "scope": scope, "skip": skip or (), "only": only or ()}
    asked = checks.numbers("--budgets", budgets)
    plans = adapt(network, batches, budgets=asked, held_out=held_out, seed=seed, progress=not quiet, **chosen)
    plans.sort(key=lambda plan: -plan.budget)
    folders = [out / f"{plan.budget:g}" for plan in plans]
    for plan, folder in zip(plans, folders, strict=True):
        plan.save(folder)
    points = [_point(plan) for plan in plans]
    name, measured = _measured(points)
    best = None if measured is None else knee([getattr(point, metric) for point in points], [one.mean for one in measured])
    times = _times(network, batches, plans)
    screen = Screen(quiet)
    screen.summary(_title(points), *_table(points, times, best))
    screen.lines(_knee_lines(name, best, metric))
    screen.lines(line for text in _notes(plans) for line in textwrap.wrap(text, COLUMNS, subsequent_indent="  "))
    figure = _figure(out, f"{model}, recipe {plans[0].recipe}", metric, points, measured, name, best, times)
    screen.lines([f"plans written to {out}/BUDGET" if figure is None else f"plans in {out}/BUDGET, figure {figure}"], whole=True)
    if measured is not None and figure is None:
        screen.lines([sweep_plot.HINT])
    take = folders[0 if best is None else best]
    screen.next_steps(
        (f"rana-fx compare {model} --plan {take} --data TEXT", "speed here"),
        (f"rana-fx generate {model} --plan {take} --prompt TEXT", "run it"),
    )
    options = {"column": column, "split": split, "tokens": tokens, "context": context, "batch_size": batch_size}
    facts = facts_of("sweep", seed=seed, model=model, data=data, out=out, dtype=dtype, device=str(network.device), **options)
    facts |= {
        "plans": [{"out": str(folder), "digest": plan.digest()} for plan, folder in zip(plans, folders, strict=True)],
        "curve": plans[0].to_dict()["curve"],
        "expected_ms": None if times is None else {"plans": times[0], "dense": times[1]},
        "knee": None if best is None else plans[best].budget,
        "recommended": str(take),
        "figure": None if figure is None else str(figure),
    }
    write_json(json, facts)


def _point(plan: Plan) -> CurvePoint:
    point = None if plan.curve is None else plan.curve.at(plan.budget)
    assert point is not None  # plans of several budgets are measured
    return point


def _measured(points: Sequence[CurvePoint]) -> tuple[str, list[Interval] | None]:
    """(name, values): the increase of the loss; the divergence where there are no next tokens; None of too few documents."""
    for name in _MEASURES:
        found = [value for point in points if isinstance(value := getattr(point, name), Interval)]
        if len(found) == len(points):
            return name, found
    return "loss", None


def _times(network: Any, batches: Sequence[Any], plans: Sequence[Plan]) -> Times | None:
    """Expected times of a decoded token, of plans and of the dense model; None where nothing is known (not a GPU)."""
    if network.device.type != "cuda":
        return None
    from rana_fx.calibration.calibrate import calibrate
    from rana_fx.step_time import step_time

    layout = calibrate(network, [{key: value[:1] for key, value in batches[0].items()}], progress=False).layout
    steps = [step for plan in plans if (step := step_time(layout, plan, network.device)) is not None]
    return ([step.ms for step in steps], steps[0].dense_ms) if len(steps) == len(plans) else None


def _title(points: Sequence[CurvePoint]) -> str:
    return f"on {points[0].documents} held-out documents ({points[0].tokens:,} tokens; 95 % intervals), against dense"


def _table(
    points: Sequence[CurvePoint], times: Times | None, best: int | None
) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    columns = ("budget", "flops", "bytes", "loss +", AT_MOST, "ppl +", "KL", *(() if times is None else ("ms a token",)), "")
    rows: list[tuple[object, ...]] = []
    for index, point in enumerate(points):
        loss, ppl, kl = point.loss, point.perplexity, point.kl
        ends = (None, None) if loss is None else (loss.mean, loss.high)
        values = (*ends, None if ppl is None else ppl.mean, None if kl is None else kl.mean)
        time = () if times is None else (times[0][index],)
        rows.append((f"{point.budget:g}", point.flops, point.bytes, *values, *time, "<- knee" if index == best else ""))
    rows.append(("dense", 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, *(() if times is None else (times[1],)), ""))
    return columns, rows


def _knee_lines(name: str, best: int | None, metric: str) -> list[str]:
    if best is None:
        return ["no knee: too few documents or budgets, or the loss rises evenly; the", "largest budget is the careful choice"]
    what = _MEASURES[name].partition(",")[0]
    return ["knee: the plan farthest below the line from the cheapest plan to the dense", f"model, {what} against {metric}"]


def _notes(plans: Sequence[Plan]) -> list[str]:
    """The first remarks on whole plans, each once with its budgets."""
    found: dict[str, list[str]] = {}
    for plan in plans:
        for text in plan.notes():
            found.setdefault(text, []).append(f"{plan.budget:g}")
    return [f"remark ({', '.join(budgets)}): {text}" for text, budgets in list(found.items())[:_REMARKS]]


def _figure(
    out: Path, title: str, metric: str, points: Sequence[CurvePoint], measured: list[Interval] | None, name: str,
    best: int | None, times: Times | None,
) -> Path | None:  # fmt: skip
    """The file of the figure; None where there is nothing to draw or to draw with."""
    if measured is None or not sweep_plot.has_matplotlib():
        return None
    path = out / _FIGURE
    rows = list(zip(points, measured, strict=True))
    sweep_plot.plot(path, title, metric, rows, what=_MEASURES[name], best=best, times=times)
    return path
