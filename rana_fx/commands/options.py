"""Arguments and options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rana_fx.errors import InvalidOption
from rana_fx.recipes import RECIPES

MOST = 2**40  # largest value of any count
_LONGEST = 2**24  # in tokens
_SEEDS = {"min": -(2**63), "max": 2**63 - 1}


def file(path: Path | None) -> Path | None:
    """Callback of an option that names a file to write. Raises InvalidOption, before any work is done."""
    if path is not None and path.is_dir():  # so is an empty name
        raise InvalidOption(name="--json", got=str(path), expected="the name of a file, not of a folder")
    return path


def folder(path: Path) -> Path:
    """Callback of an option that names a folder to write to. Raises InvalidOption, before any work is done."""
    if path.exists() and not path.is_dir():
        raise InvalidOption(name="--out", got=str(path), expected="the name of a folder, not of a file")
    return path


Model = Annotated[str, typer.Argument(help="Local folder or hub name of a causal language model.", metavar="MODEL")]
Data = Annotated[
    str, typer.Option(help="Text: a .txt, .json(l), .parquet file (.xz, .gz), a folder of them, or a hub name[:config].")
]
PlanDir = Annotated[Path | None, typer.Option("--plan", help="Folder that `rana-fx adapt` wrote.")]
Json = Annotated[Path | None, typer.Option("--json", callback=file, help="Also write the facts to this file.")]
Budget = Annotated[float, typer.Option(help="Expected cost per token of the linear layers, over dense, in (0, 1].")]
Budgets = Annotated[str | None, typer.Option(help="Several budgets, such as 0.3,0.5,0.7: one calibration, a plan for each.")]
MaxKl = Annotated[
    float | None, typer.Option("--max-kl", help="Instead of a budget: the cheapest plan whose KL stays below it, nats per token.")
]
MaxLoss = Annotated[
    float | None, typer.Option("--max-loss", help="Instead of a budget: ... whose loss rises by less, nats per token.")
]
MaxPplIncrease = Annotated[
    float | None, typer.Option("--max-ppl-increase", help="Instead of a budget: ... whose perplexity rises by less, in points.")
]
Metric = Annotated[str, typer.Option(help="What the budget counts: flops or bytes.")]
Scope = Annotated[str, typer.Option(help="Linears that the budget counts: blocks, or all (output head and stem as well).")]
Recipe = Annotated[str, typer.Option(help=f"How the budget is distributed over layers: {', '.join(RECIPES)}.")]
Tokens = Annotated[int, typer.Option(min=1, max=MOST, help="Maximum number of tokens of the text to use.")]
Context = Annotated[int, typer.Option(min=2, max=_LONGEST, help="Tokens per sequence.")]
BatchSize = Annotated[int, typer.Option(min=1, max=MOST, help="Sequences per batch.")]
Column = Annotated[str, typer.Option(help="Column of the dataset that holds the text.")]
Split = Annotated[str | None, typer.Option(help="Split of the dataset, such as validation or train[:1%]. Default: train.")]
Seed = Annotated[int, typer.Option(**_SEEDS, help="Seed of everything random.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: float32 on CPU, the checkpoint's own on GPU.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1. Default: a GPU if there is one.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, max=_LONGEST, help="Maximum number of tokens to generate.")]
All = Annotated[bool, typer.Option("--all", help="A line for every adapter instead of the summary by layer and role.")]
