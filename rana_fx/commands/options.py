"""Arguments and options that several commands share, declared once. Each is checked before anything is loaded (checks.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rana_fx.choices import DTYPES, METRICS, PREFILLS, RECIPES, SCOPES
from rana_fx.commands import checks, config_file

MOST = 2**40  # largest value of any count
_LONGEST = 2**24  # in tokens
_SEEDS = {"min": -(2**63), "max": 2**63 - 1}


def completed(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Completion of a value in the shell."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def unless_completing(check: Callable[[Any], Any]) -> Callable[[typer.Context, Any], Any]:
    """A callback that checks a value, but not while the shell asks for completions: then nothing is looked up."""

    def callback(context: typer.Context, value: Any) -> Any:
        return value if context.resilient_parsing else check(value)

    return callback


Model = Annotated[
    str,
    typer.Argument(
        help="Local folder or hub name of a causal language model.", metavar="MODEL", callback=unless_completing(checks.model)
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="Text: a .txt, .json(l), .parquet file (.xz, .gz), a folder of them, or a hub name[:config].",
        callback=unless_completing(checks.data),
    ),
]
PlanDir = Annotated[Path | None, typer.Option("--plan", help="Folder that `rana-fx adapt` wrote.", callback=checks.plan)]
Json = Annotated[Path | None, typer.Option("--json", callback=checks.file, help="Also write the facts to this file.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", callback=config_file.read, is_eager=True, help="YAML or TOML file of options; given ones win."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")]
Layers = Annotated[bool, typer.Option("--layers", help="A line for every linear instead of the summary.")]
All = Annotated[bool, typer.Option("--layers", "--all", help="A line for every adapter instead of the summary.")]
Budget = Annotated[
    float, typer.Option(help="Expected cost per token of the linear layers, over dense, in (0, 1].", callback=checks.budget)
]
Budgets = Annotated[
    str | None,
    typer.Option(
        help="Several budgets, such as 0.3,0.5,0.7: one calibration, a plan for each.",
        metavar=config_file.NUMBERS,
        callback=checks.budgets,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="Instead of a budget: the cheapest plan whose KL stays below it, nats per token.", callback=checks.target("max_kl")
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(help="Instead of a budget: ... whose loss rises by less, nats per token.", callback=checks.target("max_loss")),
]
MaxPplIncrease = Annotated[
    float | None,
    typer.Option(
        help="Instead of a budget: ... whose perplexity rises by less, in points.", callback=checks.target("max_ppl_increase")
    ),
]
Refine = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST,
        metavar="TOKENS",
        help="Then distil the plan from the dense model on so many tokens of the text; kept if other text of it loses less.",
    ),
]
Metric = Annotated[
    str,
    typer.Option(help="What the budget counts: flops or bytes.", callback=checks.metric, autocompletion=completed(METRICS)),
]
Scope = Annotated[
    str,
    typer.Option(
        help="Linears that the budget counts: blocks, or all (output head and stem as well).",
        callback=checks.choice("scope", SCOPES),
        autocompletion=completed(SCOPES),
    ),
]
Recipe = Annotated[
    str,
    typer.Option(
        help=f"How the budget is distributed over layers: {', '.join(RECIPES)}.",
        callback=checks.recipe,
        autocompletion=completed(RECIPES),
    ),
]
Skip = Annotated[
    list[str] | None, typer.Option(help="Linears that stay dense, such as '*.down_proj' or model.layers.0 (repeatable).")
]
Only = Annotated[list[str] | None, typer.Option(help="Adapt no linears but these (patterns as in --skip, repeatable).")]
Tokens = Annotated[int, typer.Option(min=1, max=MOST, help="Maximum number of tokens of the text to use.")]
Context = Annotated[int, typer.Option(min=2, max=_LONGEST, help="Tokens per sequence.")]
BatchSize = Annotated[int, typer.Option(min=1, max=MOST, help="Sequences per batch.")]
Column = Annotated[str, typer.Option(help="Column of the dataset that holds the text.")]
Split = Annotated[str | None, typer.Option(help="Split of the dataset, such as validation or train[:1%]. Default: train.")]
Seed = Annotated[int, typer.Option(**_SEEDS, help="Seed of everything random.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: the plan's; without a plan float32 on CPU, the checkpoint's own on GPU.",
        callback=checks.option("dtype", DTYPES),
        autocompletion=completed(DTYPES),
    ),
]
Prefill = Annotated[
    str,
    typer.Option(
        help="Which tokens are adapted: masked (all), dense, cheapest, factors.",
        callback=checks.option("prefill", PREFILLS),
        autocompletion=completed(PREFILLS),
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1. Default: a GPU if there is one.", callback=checks.device)
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, max=_LONGEST, help="Maximum number of tokens to generate.")]
