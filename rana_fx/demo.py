"""The demo: a trained language model adapted by the paper's method, compiled, and held against its dense self.

In: the model and the texts that ship with the package. Out: facts: perplexity, cost of the linear layers per token asked
and measured, the continuation of a prompt and the time of a decoded token, each dense and adapted. No network is needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources
from typing import Any

import torch

from rana_fx._backend import backend
from rana_fx.adaptation import adapt
from rana_fx.evaluation.generate import Generated, compiled_forward, generate
from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted, load_model
from rana_fx.evaluation.text import load_texts, token_batches

PROMPT = "It was a dark evening, and the old man sat by the fire"
NOTE = (
    "A decoded token reads only the weight rows it keeps. On a GPU, layers as small as this model's run as dense products on "
    "masked inputs all the same: skipping rows would not pay for its launch."
)
_REPEATS = 3


def run(
    *,
    budget: float = 0.58,
    metric: str = "flops",
    recipe: str = "paper",
    tokens: int = 32_000,
    context: int = 512,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Everything the demo shows, as JSON-able facts.

    Args:
        tokens: of calibration, and at most so many of evaluation.
        say: is told each step before it begins.

    Raises:
        What ``rana_fx.adapt`` raises.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    data = resources.files("rana_fx") / "data"
    with (
        resources.as_file(data / "tiny-llama-prose-5m") as folder,
        resources.as_file(data / "calib.jsonl.xz") as calib,
        resources.as_file(data / "eval.jsonl.xz") as held_out,
    ):
        say("1/5  loading the embedded model, tiny-llama-prose-5m (5.5 M parameters)")
        model, tokenizer = load_model(str(folder), dtype=dtype, device=device)
        sizes = {"tokens": tokens, "context": context, "batch_size": batch_size}
        calibration = token_batches(load_texts(calib), tokenizer, **sizes)
        evaluation = token_batches(load_texts(held_out), tokenizer, **sizes)

    say("2/5  perplexity of the dense model on held-out text")
    dense = evaluate(model, evaluation, progress=progress)
    say(f"3/5  adapting: recipe {recipe}, budget {budget:g} of the dense {metric}, {tokens:,} tokens of calibration text")
    begun = time.perf_counter()
    plan = adapt(model, calibration, budget=budget, metric=metric, recipe=recipe, seed=seed, progress=progress)
    adapt_s = time.perf_counter() - begun
    say("4/5  perplexity of the adapted model on the same text, counting what it keeps")
    adapted, measured = evaluate_adapted(model, evaluation, progress=progress)
    say("5/5  compiling both (dense by Inductor, adapted by rana) and generating")
    runs = {"dense": compiled_forward(model, "inductor"), "adapted": compiled_forward(model, backend)}
    cold: dict[str, Generated] = {}
    warm: dict[str, list[Generated]] = {"dense": [], "adapted": []}
    for turn in range(_REPEATS + 1):
        # by turns, so that both meet the same state of the machine
        for name, forward in runs.items():
            made = generate(model, tokenizer, PROMPT, forward=forward, max_new_tokens=max_new_tokens)
            if turn:
                warm[name].append(made)
            else:
                cold[name] = made
    timings = {name: _timing(cold[name], warm[name]) for name in runs}
    return {
        "model": "tiny-llama-prose-5m",
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "recipe": plan.recipe,
        "plan": plan.digest(),
        "calibration_tokens": plan.tokens,
        "evaluation_tokens": dense.tokens,
        "quality": {"dense": asdict(dense), "adapted": asdict(adapted)},
        "perplexity_ratio": adapted.perplexity / dense.perplexity,
        "budget": {
            "asked": budget,
            "metric": metric,
            "measured": {"flops": measured.budget_flops, "bytes": measured.budget_bytes},
        },
        "generation": {"prompt": PROMPT, **timings},
        "speedup": _ratio(timings["dense"]["ms_per_token"], timings["adapted"]["ms_per_token"]),
        "adapt_seconds": adapt_s,
        "seconds": time.perf_counter() - started,
        "note": NOTE,
    }


def _timing(cold: Generated, warm: list[Generated]) -> dict[str, Any]:
    steps = [step for made in warm for step in made.steps_ms]
    spread = statistics.quantiles(steps, n=10) if len(steps) > 1 else []
    return {
        "text": warm[-1].text,
        "tokens": warm[-1].tokens,
        "ms_per_token": statistics.median(steps) if steps else None,
        "ms_per_token_p20_p80": [spread[1], spread[7]] if spread else None,
        # what the first run took longer than a later one
        "compile_seconds": cold.seconds - statistics.median(made.seconds for made in warm),
    }


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None
