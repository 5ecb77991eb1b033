"""Batches that judge a choice are kept out of the sample that it was made from."""

from __future__ import annotations

from torch import nn

from rana_fx.rehearse import Keeper


def test_every_eighth_batch_is_held_out_up_to_two():
    keeper = Keeper(range(30))
    sampled = list(keeper)
    found = keeper.rehearsal(nn.Identity())
    assert found.held == (7, 15)
    assert sampled == [batch for batch in range(30) if batch not in found.held]
    assert set(found.batches) <= set(sampled)


def test_with_few_batches_one_that_was_sampled_judges():
    keeper = Keeper(range(3))
    assert list(keeper) == [0, 1, 2] and keeper.rehearsal(nn.Identity()).held == (2,)
