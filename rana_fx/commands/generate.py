"""``rana-fx generate``: continue a prompt with the compiled model, dense or adapted."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rana_fx.choices import CACHES
from rana_fx.commands import checks
from rana_fx.commands import options as o
from rana_fx.commands.record import facts_of, write_json
from rana_fx.commands.screen import Screen


def command(
    model: o.Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    plan: o.PlanDir = None,
    max_new_tokens: o.NewTokens = 64,
    cache: Annotated[
        str, typer.Option(help="Key/value cache: static or dynamic.", callback=checks.option("cache", CACHES))
    ] = "static",
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    json: o.Json = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Continue a prompt greedily, with the adapted model compiled by rana (--plan) or the dense model compiled by Inductor."""
    import torch

    from rana_fx._backend import backend
    from rana_fx.commands.loading import load
    from rana_fx.evaluation.generate import compiled_forward, generate
    from rana_fx.runtime.cpu_threads import one_thread_per_core

    one_thread_per_core()
    torch.manual_seed(seed)
    network, tokenizer, loaded = load(model, plan, dtype=dtype, device=device)
    forward = compiled_forward(network, "inductor" if loaded is None else backend)
    live = _Live(prompt)
    made = generate(network, tokenizer, prompt, forward=forward, max_new_tokens=max_new_tokens, cache=cache, live=live.part)
    live.end()
    # the median over steps is not affected by the two or three steps that compile
    compile_s = None if made.ms_per_token is None else made.seconds - made.tokens * made.ms_per_token / 1000
    facts = facts_of(
        "generate", seed=seed, model=model, plan=plan, dtype=dtype, device=str(network.device), max_new_tokens=max_new_tokens
    )
    facts |= {
        "prompt": prompt,
        "text": made.text,
        "backend": "inductor" if loaded is None else "rana",
        "cache": cache,
        "tokens": made.tokens,
        "ms_per_token": made.ms_per_token,
        "compile_seconds": compile_s,
        "threads": torch.get_num_threads() if network.device.type == "cpu" else None,
        "digest": None if loaded is None else loaded.digest(),
    }
    screen = Screen(quiet)
    screen.facts("generated", _rows(facts))
    if loaded is None:
        screen.next_steps((f"rana-fx adapt {model} --data TEXT --out plan", "make a plan, for faster tokens"))
    else:
        screen.next_steps((f"rana-fx compare {model} --plan {plan} --data TEXT", "dense beside adapted: quality, speed"))
    write_json(json, facts)


class _Live:
    """Prints the prompt with the first word after it, and what follows as it is made; also with --quiet: it is the result."""

    def __init__(self, prompt: str) -> None:
        self._before = prompt

    def part(self, text: str) -> None:
        typer.echo(self._before + text, nl=False)
        self._before = ""

    def end(self) -> None:
        typer.echo(self._before)


def _rows(facts: dict[str, Any]) -> list[tuple[str, object]]:
    digest = facts["digest"]
    return [
        ("plan", "none: the dense model" if digest is None else digest[:12]),
        ("compiled by", f"{facts['backend']}, {facts['cache']} cache"),
        *([("threads", facts["threads"])] if facts["threads"] else []),
        ("new tokens", facts["tokens"]),
        ("ms a token, median", facts["ms_per_token"]),
        ("compilation and prompt, seconds", facts["compile_seconds"]),
    ]
