"""Adapt a model to a budget, print what each kind of layer keeps, and save the plan.

    python examples/adapt_and_save.py
    python examples/adapt_and_save.py --model MODEL --data text.jsonl --budget 0.58 --tokens 32000 --out plan

MODEL is a folder or a name on the hub. A later program needs the model and the folder of the plan: examples/generate.py.
"""

from __future__ import annotations

from pathlib import Path

import typer

import rana_fx
from rana_fx.evaluation.perplexity import load_model
from rana_fx.evaluation.text import load_texts, token_batches

EMBEDDED = Path(rana_fx.__file__).parent / "data"


def main(
    model: str = str(EMBEDDED / "tiny-llama-prose-5m"),
    data: str = str(EMBEDDED / "calib.jsonl.xz"),
    budget: float = 0.58,
    tokens: int = 16000,
    context: int = 256,
    out: str = "plan",
) -> None:
    """Adapt MODEL on DATA, of which TOKENS are read in pieces of CONTEXT."""
    network, tokenizer = load_model(model)
    batches = token_batches(load_texts(data), tokenizer, tokens=tokens, context=context)
    plan = rana_fx.adapt(network, batches, budget=budget)
    print(plan)
    # what would run for a batch like this one on this device, and why
    print(rana_fx.explain(network, batches[0]))
    plan.save(out)
    print(f"saved in {out}: rana_fx.attach(model, {out!r})")


if __name__ == "__main__":
    typer.run(main)
