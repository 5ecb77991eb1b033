"""The loss of a step is the mean over all its targets, for any distribution of targets over batches."""

from __future__ import annotations

import pytest
import torch

from rana_fx.training import Settings, loop
from tests.support.architectures import build, ids


def test_targets_count_alike_in_all_batches():
    model, _ = build("plain_llama", 1)
    model = model.double()
    batches = [ids(tokens=12) | {"attention_mask": torch.ones(2, 12, dtype=torch.long)} for _ in range(2)]
    batches[1]["attention_mask"][:, 3:] = 0
    losses = []
    for batch in batches:
        logits = model(**batch).logits[:, :-1].float()
        real = batch["attention_mask"][:, 1:] != 0
        losses.append(torch.nn.functional.cross_entropy(logits[real], batch["input_ids"][:, 1:][real], reduction="none"))
    expected = torch.cat(losses).mean()
    (wanted,) = torch.autograd.grad(expected, [model.lm_head.weight])
    assert loop._accumulate(model, None, batches, Settings()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(model.lm_head.weight.grad, wanted, rtol=1e-6, atol=1e-12)
