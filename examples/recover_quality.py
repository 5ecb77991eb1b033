"""Train an adapted model, with its masks in place, to recover what a small budget loses.

    python examples/recover_quality.py
    python examples/recover_quality.py --model MODEL --data text.jsonl --tokens 6000000 --out tuned

`rana-fx finetune` does the same with LoRA, checkpoints and a search for the learning rate (docs/how-to/finetune.md).
"""

from __future__ import annotations

from pathlib import Path

import typer

import rana_fx
from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted, load_model
from rana_fx.evaluation.text import load_texts, token_batches
from rana_fx.training import Settings, train, trainable, trained_plan

EMBEDDED = Path(rana_fx.__file__).parent / "data"


def main(
    model: str = str(EMBEDDED / "tiny-llama-prose-5m"),
    data: str = str(EMBEDDED / "calib.jsonl.xz"),
    test: str = str(EMBEDDED / "eval.jsonl.xz"),
    budget: float = 0.4,
    recipe: str = "rana",
    tokens: int = 30000,
    calibration_tokens: int = 8000,
    test_tokens: int = 8000,
    context: int = 128,
    rate: float = 1e-3,
    out: str = "tuned",
) -> None:
    """Adapt to BUDGET, train on TOKENS of DATA, and measure on TEST before and after."""
    # fp32: small steps of a weight are lost in 16 bits
    network, tokenizer = load_model(model, dtype="float32")
    batches = token_batches(load_texts(data), tokenizer, tokens=tokens, context=context)
    held_out = token_batches(load_texts(test), tokenizer, tokens=test_tokens, context=context)
    few = token_batches(load_texts(data), tokenizer, tokens=calibration_tokens, context=context)
    rana_fx.adapt(network, few, budget=budget, recipe=recipe)
    dense = evaluate(network, held_out, progress=False).perplexity
    before = evaluate_adapted(network, held_out, progress=False)[0].perplexity

    trainable(network, what="all")  # "factors": the weights of the model stay as they are
    # half of the loss is the distance from the dense model's predictions
    train(network, batches, settings=Settings(rate=rate, distill=0.5))
    after = evaluate_adapted(network, held_out, progress=False)[0].perplexity
    print(f"perplexity: dense {dense:.2f}, adapted {before:.2f}, adapted and trained {after:.2f}")

    trained_plan(network).save(f"{out}/plan")  # valid for the weights as they are now
    rana_fx.detach(network)
    network.save_pretrained(f"{out}/model")
    tokenizer.save_pretrained(f"{out}/model")
    print(f"saved in {out}: rana-fx eval {out}/model --plan {out}/plan --data {test}")


if __name__ == "__main__":
    typer.run(main)
