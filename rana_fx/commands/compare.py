"""``rana-fx compare``: a model with its plan and without it, side by side on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rana_fx.commands import checks
from rana_fx.commands import options as o
from rana_fx.commands.record import data_texts, facts_of, write_json
from rana_fx.commands.screen import Screen


def command(
    model: o.Model,
    plan: Annotated[Path, typer.Option(help="Folder that `rana-fx adapt` wrote.", callback=checks.needed_plan)],
    data: o.Data,
    tokens: o.Tokens = 16_384,
    new_tokens: Annotated[int, typer.Option(min=1, max=o.MOST, help="Tokens to decode and time, in each of 3 rounds.")] = 32,
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
    """MODEL dense and adapted on this device: quality on a text, speed, memory, and whether anything is gained."""
    import torch

    from rana_fx.commands.held_out_text import rows_of
    from rana_fx.commands.loading import load
    from rana_fx.evaluation.compare import compare
    from rana_fx.evaluation.verdict import lines

    torch.manual_seed(seed)
    network, tokenizer, _ = load(model, plan, dtype=dtype, device=device)
    texts = data_texts(network, data, column=column, split=split, tokens=tokens, context=context, shuffle=seed)
    rows, independent = rows_of(texts, tokenizer, tokens=tokens, context=context, batch_size=batch_size)
    found = compare(network, rows, new_tokens=new_tokens, independent=independent, progress=not quiet)
    screen = Screen(quiet)
    screen.lines(lines(found))
    screen.next_steps(
        (f"rana-fx generate {model} --plan {plan} --prompt TEXT", "run it"),
        (f"rana-fx sweep {model} --data {data}", "other budgets"),
    )
    options = {"column": column, "split": split, "tokens": tokens, "context": context, "batch_size": batch_size}
    facts = facts_of("compare", seed=seed, model=model, data=data, plan=plan, dtype=dtype, device=str(network.device), **options)
    write_json(json, facts | {"comparison": found.to_dict()})
