"""Batches that evaluate a choice are not part of the calibration sample."""

from __future__ import annotations

from torch import nn

from rana_fx.calibration.holdout import Tee


def test_every_eighth_batch_is_held_out_up_to_two():
    tee = Tee(range(30))
    sampled = list(tee)
    found = tee.holdout(nn.Identity())
    assert found.held == (7, 15)
    assert sampled == [batch for batch in range(30) if batch not in found.held]
    assert set(found.batches) <= set(sampled)


def test_with_few_batches_one_that_was_sampled_judges():
    tee = Tee(range(3))
    assert list(tee) == [0, 1, 2] and tee.holdout(nn.Identity()).held == (2,)
