"""What an adapter keeps is counted over real tokens alone."""

from __future__ import annotations

import pytest
import torch

from rana_fx.evaluation.measure import measuring
from tests.support.architectures import ids
from tests.support.trained import adapted


def test_padding_is_not_measured():
    model, _ = adapted("teal", depth=1)
    batch = ids(tokens=12)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 7:] = 0
    with measuring(model) as meter:
        meter.run(batch | {"attention_mask": mask})
        padded = meter.result()
    with measuring(model) as meter:
        meter.run({"input_ids": batch["input_ids"][:, :7], "attention_mask": mask[:, :7]})
        alone = meter.result()
    assert padded.tokens == alone.tokens == 7 * len(mask)
    # a score may lie within rounding of its threshold: not more than a few of them
    assert padded.density == pytest.approx(alone.density, abs=0.01)
