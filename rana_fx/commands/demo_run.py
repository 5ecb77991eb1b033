"""The demo: a trained language model, adapted, compiled and compared with the dense model.

In: the model and the texts that ship with the package. Out: facts: perplexity, target and measured cost of the linear
layers per token, the continuation of a prompt and the time of a decoded token, each dense and adapted. No network is needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch

from rana_fx._backend import backend
from rana_fx.adaptation import adapt
from rana_fx.evaluation.generate import Generated, compiled_forward, generate
from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted, load_model
from rana_fx.evaluation.text import load_texts, token_batches
from rana_fx.plan import Plan

PROMPT = "It was a dark evening, and the old man sat by the fire"
NOTE = (
    "A decoded token reads only the weight rows it keeps. On a GPU, layers as small as this model's run as dense matmuls on "
    "masked inputs: a launch takes longer there than skipped rows save."
)
_MODEL = "tiny-llama-prose-5m"
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``rana-fx demo``. ``tokens``: maximum number, of calibration and of evaluation text."""

    budget: float = 0.58
    metric: str = "flops"
    recipe: str = "rana"
    tokens: int = 32_000
    context: int = 512
    batch_size: int = 8
    max_new_tokens: int = 64
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"


def run(options: Options, *, progress: bool = True, report: Callable[[str], None] = print) -> tuple[dict[str, Any], Plan]:
    """Run the demo; returns its results as JSON-able facts, and the plan.

    Args:
        report: called with a line of text before each step.

    Raises:
        What ``rana_fx.adapt`` raises.
    """
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    report(f"1/5  loading the embedded model, {_MODEL} (5.5 M parameters)")
    model, tokenizer, calibration, evaluation = _load(options)
    report("2/5  perplexity of the dense model on held-out text")
    dense = evaluate(model, evaluation, progress=progress)
    of_dense = f"budget {options.budget:g} of the dense {options.metric}"
    report(f"3/5  adapting: recipe {options.recipe}, {of_dense}, {options.tokens:,} tokens of text")
    begun = time.perf_counter()
    target = {"budget": options.budget, "metric": options.metric, "recipe": options.recipe, "seed": options.seed}
    plan = adapt(model, calibration, progress=progress, **target)  # type: ignore[call-overload]
    adapt_s = time.perf_counter() - begun
    report("4/5  perplexity of the adapted model on the same text")
    adapted, measured = evaluate_adapted(model, evaluation, progress=progress)
    report("5/5  compiling both and generating")
    timings = _generate(model, tokenizer, options.max_new_tokens)
    facts = {
        "model": _MODEL,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "recipe": plan.recipe,
        "plan": plan.digest(),
        "calibration_tokens": plan.tokens,
        "evaluation_tokens": dense.tokens,
        "quality": {"dense": asdict(dense), "adapted": asdict(adapted)},
        "perplexity_ratio": adapted.perplexity / dense.perplexity,
        "budget": {
            "asked": options.budget,
            "metric": options.metric,
            "measured": {"flops": measured.budget_flops, "bytes": measured.budget_bytes},
        },
        "generation": {"prompt": PROMPT, **timings},
        "speedup": _ratio(timings["dense"]["ms_per_token"], timings["adapted"]["ms_per_token"]),
        "adapt_seconds": adapt_s,
        "seconds": time.perf_counter() - started,
        "note": NOTE,
    }
    return facts, plan


def gain(facts: dict[str, Any]) -> str:
    """One sentence on the speedup and the increase of perplexity, or that decoding is not faster on this device."""
    dense, adapted = (facts["quality"][name]["perplexity"] for name in ("dense", "adapted"))
    cost = f"perplexity rises from {dense:.2f} to {adapted:.2f} ({facts['perplexity_ratio'] - 1:+.1%})"
    work = f"a token needs {facts['budget']['measured']['flops']:.0%} of the dense multiply-adds in the linears"
    speedup = facts["speedup"]
    if speedup is None:
        return f"Result: {work}, and {cost}; too few tokens were generated to compare speed."
    times = f"{facts['generation']['dense']['ms_per_token']:.2f} to {facts['generation']['adapted']['ms_per_token']:.2f} ms"
    if speedup <= 1:
        return f"Result: nothing is gained in speed on this device ({times} a token), although {work}; {cost}."
    return f"Result: decoding is {speedup:.2f} times as fast ({times} a token), since {work}; {cost}."


def _load(options: Options) -> tuple[Any, Any, list[Any], list[Any]]:
    """(model, tokenizer, calibration batches, evaluation batches), all of which ship with the package."""
    data = resources.files("rana_fx") / "data"
    with (
        resources.as_file(data / _MODEL) as folder,
        resources.as_file(data / "calib.jsonl.xz") as calib,
        resources.as_file(data / "eval.jsonl.xz") as held_out,
    ):
        model, tokenizer = load_model(str(folder), dtype=options.dtype, device=options.device)
        sizes = {"tokens": options.tokens, "context": options.context, "batch_size": options.batch_size}
        calibration, evaluation = (token_batches(load_texts(text), tokenizer, **sizes) for text in (calib, held_out))
    return model, tokenizer, calibration, evaluation


def _generate(model: Any, tokenizer: Any, max_new_tokens: int) -> dict[str, dict[str, Any]]:
    """Timings of both models, from interleaved runs, so that a change of the machine's load affects both."""
    runs = {"dense": compiled_forward(model, "inductor"), "adapted": compiled_forward(model, backend)}
    made: dict[str, list[Generated]] = {name: [] for name in runs}
    for _ in range(_REPEATS + 1):
        for name, forward in runs.items():
            made[name].append(generate(model, tokenizer, PROMPT, forward=forward, max_new_tokens=max_new_tokens))
    return {name: _timing(first, rest) for name, (first, *rest) in made.items()}


def _timing(cold: Generated, warm: list[Generated]) -> dict[str, Any]:
    steps = [step for made in warm for step in made.steps_ms]
    spread = statistics.quantiles(steps, n=10) if len(steps) > 1 else []
    return {
        "text": warm[-1].text,
        "tokens": warm[-1].tokens,
        "ms_per_token": statistics.median(steps) if steps else None,
        "ms_per_token_p20_p80": [spread[1], spread[7]] if spread else None,
        # the extra time of the first run over a later one
        "compile_seconds": cold.seconds - statistics.median(made.seconds for made in warm),
    }


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None
