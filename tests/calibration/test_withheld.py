"""Batches that judge finished plans are seen by nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rana_fx.calibration.holdout import Tee
from rana_fx.calibration.withheld import MOST_TOKENS, Withheld
from rana_fx.errors import InvalidOption


def numbered(count, tokens=16):
    return [{"input_ids": torch.full((2, tokens // 2), index)} for index in range(count)]


def numbers(batches):
    return {int(batch["input_ids"][0, 0]) for batch in batches}


def test_every_fourth_batch_is_seen_neither_by_calibration_nor_by_recipes():
    batches = numbered(60)
    withheld = Withheld(batches)
    tee = Tee(withheld)
    sampled = list(tee)
    found = tee.holdout(nn.Identity())
    measured = numbers(withheld.batches())
    assert measured == set(range(3, 60, 4))
    assert not measured & (numbers(sampled) | numbers(found.held) | numbers(found.batches))
    assert measured | numbers(sampled) | numbers(found.held) == set(range(60))


def test_a_long_text_is_not_withheld_beyond_so_many_tokens():
    withheld = Withheld(numbered(80, tokens=2048))
    calibrated = list(withheld)
    assert sum(batch["input_ids"].numel() for batch in withheld.batches()) == MOST_TOKENS
    assert len(calibrated) == 80 - MOST_TOKENS // 2048


def test_batches_of_the_callers_own():
    batches, own = numbered(12), numbered(3, tokens=8192)
    withheld = Withheld(batches, iter(own))
    assert list(withheld) == batches
    # in pieces of rows, so that the model runs on few tokens at a time
    assert [len(piece["input_ids"]) for piece in withheld.batches()] == [1] * 6
    with pytest.raises(InvalidOption, match="option held_out="):
        Withheld(batches, batches[0])
