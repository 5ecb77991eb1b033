"""A remark on a budget that is too low for its model: the plan is compared with a smaller dense model of the same cost.

In: the KL divergence of the simulated adapted model from the dense one, on held-out batches, and the dense model's entropy
there, both in nats per token. Out: a remark, or none.

The alternative to a plan of budget b is a dense model with b times the weights in its blocks. By the scaling law of language
models (Kaplan et al., arXiv 2001.08361, equation 1.1) the loss of a model of N such weights is proportional to N ** -0.076. So
the smaller model loses (b ** -0.076 - 1) times the dense model's loss, for which its entropy stands: a trained model is about
as uncertain as it is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rana_fx.calibration.instrumented import InstrumentedModel
from rana_fx.calibration.sensitivity import logits_of, real_outputs, rows_at_once

EXPONENT = 0.076


def mean_entropy(outputs: Sequence[Any], model: InstrumentedModel) -> float | None:
    """Of the dense model's distributions, in nats per token; None where its outputs are no logits."""
    total, count = 0.0, 0
    for output in outputs:
        logits = logits_of(output)
        if logits is None:
            return None
        rows = real_outputs(logits, model)
        for chunk in rows.split(rows_at_once(logits.shape[-1])):
            log_p = chunk.float().log_softmax(-1)
            total -= float((log_p.exp() * log_p.clamp_min(-1e4)).sum())  # 0 log 0 = 0
        count += len(rows)
    return total / count if count else None


def loss_of_smaller_model(budget: float, entropy: float) -> float:
    """Nats per token that a dense model with ``budget`` times the weights loses, against one of this entropy."""
    return entropy * (math.pow(budget, -EXPONENT) - 1)


def remark(*, budget: float, divergence: float, entropy: float | None) -> str:
    """The remark, or "" where the plan loses no more than a smaller dense model."""
    if entropy is None or divergence <= loss_of_smaller_model(budget, entropy):
        return ""
    return (
        f"quality will suffer at a budget of {budget:g}: the plan is expected to lose {divergence:.2g} nats per token "
        f"(perplexity times {math.exp(min(divergence, 700.0)):.3g}), a dense model of that cost "
        f"{loss_of_smaller_model(budget, entropy):.2g}: raise the budget, take a smaller model, or fine-tune"
    )
