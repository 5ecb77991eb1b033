"""``rana-fx eval``: perplexity of a model on a text, dense and, with a plan, adapted, and the measured budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rana_fx.commands import options as o
from rana_fx.commands.plan_table import Table
from rana_fx.commands.record import data_batches, facts_of, write_json
from rana_fx.commands.screen import Screen

if TYPE_CHECKING:
    from rana_fx.evaluation.measure import Measurement
    from rana_fx.plan import Plan

_DENSITIES = ("density_expected", "density_measured")


def command(
    model: o.Model,
    data: o.Data,
    plan: o.PlanDir = None,
    tokens: o.Tokens = 32_000,
    context: o.Context = 512,
    batch_size: o.BatchSize = 8,
    column: o.Column = "text",
    split: o.Split = None,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    layers: o.Layers = False,
    json: o.Json = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Perplexity of MODEL on a text; with --plan also of the adapted model, and its measured densities and budget."""
    import torch

    from rana_fx.commands.loading import load
    from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted

    screen = Screen(quiet)
    torch.manual_seed(seed)
    network, tokenizer, loaded = load(model, plan, dtype=dtype, device=device)
    text = {"column": column, "split": split, "tokens": tokens, "context": context, "batch_size": batch_size}
    batches = data_batches(
        network, tokenizer, data, column=column, split=split, tokens=tokens, context=context, batch_size=batch_size
    )
    # the eager model is the dense one, also with a plan attached
    dense = evaluate(network, batches, progress=not quiet)
    facts = facts_of("eval", seed=seed, model=model, data=data, plan=plan, dtype=dtype, device=str(network.device), **text)
    facts |= {"tokens": dense.tokens, "dense": asdict(dense), "adapted": None, "budget": None, "sites": []}
    if loaded is not None:
        adapted, measured = evaluate_adapted(network, batches, progress=not quiet)
        facts |= {
            "adapted": asdict(adapted),
            "perplexity_ratio": adapted.perplexity / dense.perplexity,
            "recipe": loaded.recipe,
            "digest": loaded.digest(),
            "budget": {
                "asked": loaded.budget,
                "metric": loaded.metric,
                "scope": loaded.scope,
                "expected": {"flops": loaded.expected_budget("flops"), "bytes": loaded.expected_budget("bytes")},
                "measured": {"flops": measured.budget_flops, "bytes": measured.budget_bytes},
            },
            "sites": _sites(loaded, measured),
        }
        roles = {site.name: site.role for site in loaded.sites}
        if layers:
            columns = _columns(facts["sites"])
            rows = [tuple(row[key.replace(" ", "_")] for key in columns) for row in facts["sites"]]
            screen.table("density per linear", columns, rows)
        else:
            screen.summary("density by role: ranks or inputs that a token keeps, over all", *by_role(facts["sites"], roles))
    screen.table(f"{model} on {data}", ("", "dense", "adapted"), _rows(facts))
    if loaded is None:
        screen.next_steps((f"rana-fx adapt {model} --data TEXT --out plan", "make a plan"))
    else:
        screen.next_steps((f"rana-fx generate {model} --plan {plan} --prompt TEXT", "run it"))
        if not layers:
            screen.lines(["--layers: a line for every linear"])
    write_json(json, facts)


def by_role(sites: list[dict[str, Any]], roles: Mapping[str, str]) -> Table:
    """A row for each role: linears, mean densities expected and measured, and the linear where they differ most."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sites:
        groups.setdefault(roles[row["site"]].replace("_", " "), []).append(row)
    rows: list[tuple[object, ...]] = []
    for role, found in groups.items():
        measured = [row for row in found if row["density_measured"] is not None]
        means = [sum(row[key] for row in measured) / len(measured) if measured else None for key in _DENSITIES]
        furthest = max(measured, key=lambda row: abs(row[_DENSITIES[1]] - row[_DENSITIES[0]]), default=None)
        where = "-" if furthest is None else f"{furthest[_DENSITIES[1]] - furthest[_DENSITIES[0]]:+.3f} {furthest['site']}"
        rows.append((role, len(found), *means, where))
    return ("role", "linears", "expected", "measured", "largest difference"), rows


def _sites(plan: Plan, measured: Measurement) -> list[dict[str, Any]]:
    return [
        {
            "site": site,
            "adapter": adapter.name,
            "kind": adapter.kind,
            "ranks": adapter.ranks,
            "density_expected": adapter.density,
            "density_measured": measured.density.get(adapter.name),
            "router_density_expected": adapter.router_density if adapter.router_tau is not None else None,
            "router_density_measured": measured.router_density.get(adapter.name),
            "exact_density_expected": adapter.exact_density if adapter.exact_tau is not None else None,
            "exact_density_measured": measured.exact_density.get(adapter.name),
        }
        for adapter in plan.adapters
        for site in adapter.sites
    ]


def _columns(sites: list[dict[str, Any]]) -> list[str]:
    """Columns of the table; those of masked routers and of exact outputs only where the plan has any."""
    columns = ["site", "kind", "ranks", "density expected", "density measured"]
    for part in ("router", "exact"):
        if any(row[f"{part}_density_expected"] is not None for row in sites):
            columns += [f"{part} density expected", f"{part} density measured"]
    return columns


def _rows(facts: dict[str, Any]) -> list[tuple[object, ...]]:
    dense, adapted, budget = facts["dense"], facts["adapted"] or {}, facts["budget"]
    rows: list[tuple[object, ...]] = [
        ("perplexity", dense["perplexity"], adapted.get("perplexity")),
        ("mean loss, nats per token", dense["mean_loss"], adapted.get("mean_loss")),
        ("tokens predicted", dense["tokens"], adapted.get("tokens")),
    ]
    if budget is not None:
        target = {budget["metric"]: budget["asked"]}
        for metric in ("flops", "bytes"):
            rows.append((f"target budget, {metric}", 1.0, target.get(metric)))
            rows.append((f"measured budget, {metric}", 1.0, budget["measured"][metric]))
        rows.append(("recipe", "-", facts["recipe"]))
    return rows
