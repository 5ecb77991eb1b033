"""evaluate agrees with a direct computation in float64, counts only what is not padding, and refuses what has no loss."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rana_fx
from rana_fx.errors import InvalidOption, ModelError, NoBatches, NonFinite, NoPlan
from rana_fx.evaluation import perplexity as module
from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted, load_model

V = 17
MODEL = Path(rana_fx.__file__).parent / "data" / "tiny-llama-prose-5m"


def direct(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[float, int]:
    """One target at a time, in float64. Returns (sum of losses, targets)."""
    total, count = 0.0, 0
    for b in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if mask[b, t] and mask[b, t - 1]:
                total += float(torch.logsumexp(logits[b, t - 1].double(), 0) - logits[b, t - 1, ids[b, t]].double())
                count += 1
    return total, count


@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    hf=st.booleans(),
)
def test_against_float64(shapes: list[tuple[int, int]], seed: int, hf: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    table = 5 * torch.randn(V, V, generator=draw)
    batches = [
        {
            "input_ids": torch.randint(V, shape, generator=draw),
            "attention_mask": (torch.rand(shape, generator=draw) < 0.7).long(),
        }
        for shape in shapes
    ]

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor | SimpleNamespace:
        return SimpleNamespace(logits=table[input_ids]) if hf else table[input_ids]

    found = [direct(table[batch["input_ids"]], batch["input_ids"], batch["attention_mask"]) for batch in batches]
    total, count = (sum(part) for part in zip(*found, strict=True))
    if not count:
        with pytest.raises(NoBatches, match="two tokens in a row that are not padding"):
            evaluate(forward, batches, progress=False)
        return
    quality = evaluate(forward, batches, progress=False)
    assert quality.tokens == count
    # each loss is a float32 log-softmax of V values: a few eps of the largest, which is below 50
    assert quality.mean_loss == pytest.approx(total / count, abs=50 * 8 * torch.finfo(torch.float32).eps)
    assert quality.perplexity == pytest.approx(math.exp(quality.mean_loss))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = torch.randn(2, 50, V), torch.randint(V, (2, 50))
    whole = evaluate(lambda input_ids: logits, [{"input_ids": ids}], progress=False)
    monkeypatch.setattr(module, "_ROWS", 7)
    parts = evaluate(lambda input_ids: logits, [{"input_ids": ids}], progress=False)
    assert whole.tokens == parts.tokens == 98
    assert whole.mean_loss == pytest.approx(parts.mean_loss, rel=1e-12)


def test_half_precision_logits_are_summed_in_full() -> None:
    ids = torch.randint(V, (4, 300))
    logits = torch.randn(4, 300, V).bfloat16()
    total, count = direct(logits, ids, torch.ones_like(ids))
    quality = evaluate(lambda input_ids: logits, [{"input_ids": ids}], progress=False)
    assert quality.mean_loss == pytest.approx(total / count, abs=1e-5)


def test_a_module_is_evaluated_without_dropout_and_left_as_it_was() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(V, V)
            self.drop = nn.Dropout(0.9)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.drop(self.table(input_ids))

    model, batch = Small().train(), {"input_ids": torch.randint(V, (2, 20))}
    total, count = direct(model.table(batch["input_ids"]).detach(), batch["input_ids"], torch.ones(2, 20))
    quality = evaluate(model, [batch], progress=False)
    assert quality.mean_loss == pytest.approx(total / count, abs=1e-5)
    assert model.training and model.drop.training


def test_nothing_to_evaluate() -> None:
    with pytest.raises(NoBatches):
        evaluate(lambda input_ids: None, [], progress=False)


def test_losses_that_are_not_numbers() -> None:
    logits = torch.zeros(1, 5, V)
    logits[0, 2] = float("nan")
    with pytest.raises(NonFinite, match="the model's output: 1 NaN or Inf values in its losses"):
        evaluate(lambda input_ids: logits, [{"input_ids": torch.zeros(1, 5, dtype=torch.int64)}], progress=False)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    logits = torch.zeros(1, 2, V)
    logits[0, 0, 1] = 1000.0
    quality = evaluate(lambda input_ids: logits, [{"input_ids": torch.zeros(1, 2, dtype=torch.int64)}], progress=False)
    assert quality.mean_loss == 1000 and quality.perplexity == math.inf


def test_no_plan_to_evaluate() -> None:
    with pytest.raises(NoPlan):
        evaluate_adapted(nn.Linear(2, 2), [], progress=False)


def test_load_model_in_float32_on_the_cpu() -> None:
    model, tokenizer = load_model(str(MODEL), device="cpu")
    assert not model.training and tokenizer.eos_token_id is not None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    half, _ = load_model(str(MODEL), dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16


def test_load_model_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="cannot be loaded as a model: .*Expected a local folder or a name on the Hugging Face hub"
    ):
        load_model(str(tmp_path))
    with pytest.raises(InvalidOption, match="option dtype='int8' is not valid: expected one of auto, float32"):
        load_model(str(MODEL), dtype="int8")
    with pytest.raises(InvalidOption, match="option device='abacus' is not valid: expected a device of this machine: cpu"):
        load_model(str(MODEL), device="abacus")
