"""Say how much the model may change; the cheapest plan that keeps to it is searched for.

    python examples/quality_target.py
    python examples/quality_target.py --model MODEL --data text.jsonl --max-kl 0.02 --tokens 64000

The limit is the mean KL divergence from the dense model's predictions, in nats per token. What is promised is the upper end of a
95 % interval on documents that calibration does not see.
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
    max_kl: float = 0.05,
    recipe: str = "rana",
    tokens: int = 16000,
    context: int = 128,
    out: str = "plan",
) -> None:
    """Search for the cheapest plan of RECIPE whose divergence stays below MAX_KL."""
    network, tokenizer = load_model(model)
    batches = token_batches(load_texts(data), tokenizer, tokens=tokens, context=context)
    try:
        plan = rana_fx.adapt(network, batches, max_kl=max_kl, recipe=recipe)
    except rana_fx.RanaError as error:
        # the message has the divergence that was reached at the largest budget
        raise SystemExit(str(error)) from error
    assert plan.curve is not None, "plans of a target have been measured"
    print("budget  KL divergence, nats per token (95 % interval)")
    for point in plan.curve.points:
        print(f"{point.budget:6.3f}  {point.kl}" + ("   <- chosen" if point.budget == plan.budget else ""))
    plan.save(out)
    print(f"saved in {out}")


if __name__ == "__main__":
    typer.run(main)
