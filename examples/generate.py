"""Let a model with a plan write, compiled, with a static cache; then the dense model in its place.

    python examples/generate.py
    python examples/generate.py --model MODEL --plan plan --prompt "Once upon a time"

Without a plan, one is made first (examples/adapt_and_save.py makes and saves one).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import typer

import rana_fx
from rana_fx.evaluation.perplexity import load_model
from rana_fx.evaluation.text import load_texts, token_batches

EMBEDDED = Path(rana_fx.__file__).parent / "data"


def main(
    model: str = str(EMBEDDED / "tiny-llama-prose-5m"),
    plan: str | None = None,
    prompt: str = "The sea was calm, and the ship",
    new_tokens: int = 32,
    tokens: int = 8000,
) -> None:
    """Continue PROMPT by NEW_TOKENS."""
    network, tokenizer = load_model(model)
    if plan is None:
        batches = token_batches(load_texts(EMBEDDED / "calib.jsonl.xz"), tokenizer, tokens=tokens, context=128)
        rana_fx.adapt(network, batches, budget=0.6)
    else:
        rana_fx.attach(network, plan)

    # CUDA graphs where there is a GPU: launching the kernels of a small step takes longer than they run
    options = {"mode": "reduce-overhead"} if network.device.type == "cuda" else {}
    fast = torch.compile(network, backend=rana_fx.backend, options=options)
    inputs = tokenizer(prompt, return_tensors="pt").to(network.device)

    def write(title: str) -> None:
        # a static cache: all steps have one shape, and run one graph
        settings: dict[str, Any] = {"cache_implementation": "static", "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        fast.generate(**inputs, max_new_tokens=new_tokens, **settings)  # compiles
        start = time.perf_counter()
        made = fast.generate(**inputs, max_new_tokens=new_tokens, **settings)
        each = (time.perf_counter() - start) / (made.shape[1] - inputs["input_ids"].shape[1])
        print(f"{title}, {1000 * each:.1f} ms a token:\n  {tokenizer.decode(made[0], skip_special_tokens=True)}")

    write("adapted")
    with rana_fx.disabled():
        write("dense")


if __name__ == "__main__":
    typer.run(main)
