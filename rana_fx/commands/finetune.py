"""``rana-fx finetune``: a model, its plan and a text in; the trained model and its plan out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rana_fx.commands import options as o
from rana_fx.commands.memory import explained
from rana_fx.commands.record import data_batches, facts_of, show, write_json

if TYPE_CHECKING:
    from torch import Tensor


def command(
    model: o.Model,
    plan: Annotated[Path, typer.Option(help="Folder that `rana-fx adapt` wrote.")],
    data: o.Data,
    out: Annotated[Path, typer.Option(help="Folder for the trained model, its plan and checkpoints.")],
    tokens: Annotated[int, typer.Option(min=1, help="Train on so many tokens, each once.")],
    method: Annotated[
        str, typer.Option(help="lora: low-rank additions; factors: the plan's matrices; full: everything.")
    ] = "lora",
    lr: Annotated[str, typer.Option(help="Highest learning rate, or auto: try several on a fifth of the tokens.")] = "auto",
    held_out: Annotated[int, typer.Option(min=1, help="Tokens of the text to evaluate on, never trained on.")] = 16_384,
    decay: Annotated[str, typer.Option(help="After the warm-up: cosine or linear, to zero.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Fraction of the steps over which the rate rises.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="AdamW's decoupled weight decay.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of all gradients together.")] = 1.0,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    distill: Annotated[float, typer.Option(help="Weight in [0, 1] of the KL to the dense model, against cross-entropy.")] = 0.0,
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA.")] = 64,
    alpha: Annotated[float, typer.Option(help="LoRA adds alpha / rank times its product.")] = 16.0,
    dropout: Annotated[float, typer.Option(help="Dropout on what LoRA's matrices read.")] = 0.05,
    target: Annotated[
        list[str] | None, typer.Option(help="LoRA on these linears or factors (ends of names, wildcards; repeatable).")
    ] = None,
    thresholds: Annotated[bool, typer.Option(help="Estimate thresholds anew after training, to keep the budget.")] = False,
    autocast: Annotated[str | None, typer.Option(help="bfloat16: run products in it, train in --dtype.")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations: less memory, more time.")] = False,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: before and after.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 100,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out, exactly.")] = False,
    context: o.Context = 512,
    batch_size: o.BatchSize = 8,
    column: o.Column = "text",
    split: o.Split = None,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    json: o.Json = None,
) -> None:
    """Train MODEL as its plan runs it, and write it and its plan anew."""
    import torch

    from rana_fx import attach, detach, load_plan
    from rana_fx.errors import InvalidOption, TooLittleText, UnknownChoice
    from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted, load_model
    from rana_fx.training import (
        Settings,
        best_rate,
        checkpoint_gradients,
        lora_config,
        merge_lora,
        rethreshold,
        train,
        trained_plan,
    )
    from rana_fx.training.checkpoint import rate_of
    from rana_fx.training.methods import METHODS, choose
    from rana_fx.training.thresholds import SETTLING

    if method not in METHODS:  # before anything is loaded
        raise UnknownChoice(kind="method", got=method, valid=", ".join(METHODS))
    rate = _rate(lr)
    settings = Settings(
        rate=rate or 1.0, decay=decay, warmup=warmup, weight_decay=weight_decay, clip=clip, accumulate=accumulate,
        distill=distill, autocast=autocast, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    torch.manual_seed(seed)
    network, tokenizer = load_model(model, dtype=dtype, device=device)
    old = load_plan(plan)
    attach(network, old)
    at_once = context * batch_size
    steps = tokens // (at_once * accumulate)
    if not steps:
        expected = f"at least {at_once * accumulate}, one step of {accumulate} x {batch_size} x {context}"
        raise InvalidOption(name="--tokens", got=tokens, expected=expected)
    training, testing = steps * accumulate, -(-held_out // at_once)
    asked = (training + testing) * at_once
    batches = data_batches(
        network, tokenizer, data, column=column, split=split, tokens=asked, context=context, batch_size=batch_size, shuffle=seed
    )
    got = sum(int(batch["attention_mask"].sum()) for batch in batches)
    if got < asked:
        facts: dict[str, Any] = {"trained": training * at_once, "held_out": testing * at_once, "batch": at_once}
        raise TooLittleText(source=data, got=got, asked=asked, **facts)
    batches, rest = _shuffled(batches[:training], seed), batches[training:]
    dense = evaluate(network, rest)
    before, _ = evaluate_adapted(network, rest)
    config = lora_config(rank=rank, alpha=alpha, dropout=dropout, targets=target or None) if method == "lora" else None
    choose(network, method, config=config, seed=seed)
    if gradient_checkpointing:
        checkpoint_gradients(network)
    rates: dict[float, float] = {}
    with explained(
        device=network.device, out=out, batch_size=batch_size, context=context, method=method, distill=distill,
        checkpointing=gradient_checkpointing,
    ):  # fmt: skip
        if rate is None and resume:
            rate = rate_of(out)
        elif rate is None:
            rate, rates = best_rate(network, batches, settings=settings, held_out=rest)
        started = time.perf_counter()
        done = train(network, batches, settings=replace(settings, rate=rate), held_out=rest, folder=out, resume=resume)
    seconds = time.perf_counter() - started
    merge_lora(network)
    if thresholds:
        rethreshold(network, batches[: -(-SETTLING // at_once)])
    new = trained_plan(network)
    after, measured = evaluate_adapted(network, rest)
    detach(network)
    new.save(out / "plan")
    network.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    record = facts_of(
        "finetune", seed=seed, model=model, plan=plan, data=data, out=out, tokens=tokens, method=method, lr=lr, held_out=held_out,
        decay=decay, warmup=warmup, weight_decay=weight_decay, clip=clip, accumulate=accumulate, distill=distill, rank=rank,
        alpha=alpha, dropout=dropout, target=target, thresholds=thresholds, autocast=autocast,
        gradient_checkpointing=gradient_checkpointing, context=context, batch_size=batch_size, column=column, split=split,
        dtype=dtype, device=str(network.device), resume=resume,
    )  # fmt: skip
    quality = {"dense": dense.mean_loss, "before": before.mean_loss, "after": after.mean_loss}
    budget = {"asked": new.budget, "metric": new.metric}
    budget["measured"] = {"flops": measured.budget_flops, "bytes": measured.budget_bytes}
    record |= {
        "model": str(out / "model"), "plan": str(out / "plan"), "digest": new.digest(), "trained_from": old.digest(),
        "rate": rate, "rates": {f"{key:g}": loss for key, loss in rates.items()}, "steps": len(done.losses),
        "tokens": done.tokens, "held_out_tokens": after.tokens, "loss": quality, "losses": done.losses,
        "evaluations": done.evaluations, "budget": budget, "seconds": seconds,
    }  # fmt: skip
    show(
        f"fine-tuned {model}",
        ("", "value"),
        [
            ("loss held out, dense", dense.mean_loss),
            ("loss held out, adapted", before.mean_loss),
            ("loss held out, fine-tuned", after.mean_loss),
            ("budget asked", f"{new.budget:g} of the dense {new.metric}"),
            ("budget measured, flops", measured.budget_flops),
            ("budget measured, bytes", measured.budget_bytes),
            *((f"loss of rate {key:g}", loss) for key, loss in rates.items()),
            ("learning rate", f"{rate:g}"),
            ("steps", len(done.losses)),
            ("tokens", done.tokens),
            ("tokens/s", done.tokens / max(done.seconds, 1e-9)),
            ("digest", new.digest()[:12]),
            ("written to", out),
        ],
    )
    write_json(json, record)


def _rate(lr: str) -> float | None:
    """None for auto. Raises InvalidOption."""
    from rana_fx.errors import InvalidOption

    try:
        rate = None if lr == "auto" else float(lr)
    except ValueError:
        rate = -1.0
    if rate is not None and not 0 < rate < float("inf"):
        raise InvalidOption(name="--lr", got=lr, expected="a positive number or auto")
    return rate


def _shuffled(batches: list[dict[str, Tensor]], seed: int) -> list[dict[str, Tensor]]:
    """The same sequences in another order: those of one document side by side would pull each step its way."""
    import torch

    order = torch.randperm(sum(len(batch["input_ids"]) for batch in batches), generator=torch.Generator().manual_seed(seed))
    rows = {key: torch.cat([batch[key] for batch in batches])[order] for key in batches[0]}
    parts = {key: value.split(len(batches[0]["input_ids"])) for key, value in rows.items()}
    return [{key: value[index] for key, value in parts.items()} for index in range(len(batches))]
