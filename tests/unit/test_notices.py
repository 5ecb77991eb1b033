"""Warnings of what a plan could not do: one for each cause, with layer and reason; errors under strict."""

from __future__ import annotations

import warnings

import pytest

from rana_fx import RanaWarning, notices
from rana_fx.errors import NotApplied


def given(*places, strict=False):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        notices.report(places, "Do this.", strict=strict)
    return [str(warning.message) for warning in seen]


def test_one_warning_for_each_reason_with_layer_and_count():
    seen = given(("a.up", "it is cast"), ("b.up", "it is cast"), ("b.up", "it is cast"), ("c", "it is frozen"))
    assert seen == [
        "a.up (and 1 more): the plan is not applied here: it is cast. The output is right, without the saving. Do this.",
        "c: the plan is not applied here: it is frozen. The output is right, without the saving. Do this.",
    ]


def test_a_cause_is_warned_of_once_in_a_process():
    assert len(given(("a", "it is cast"))) == 1
    assert given(("b", "it is cast")) == []
    assert len(given(("b", "it is frozen"))) == 1
    notices.reset()
    assert len(given(("b", "it is cast"))) == 1


def test_it_can_be_filtered_by_its_class():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", RanaWarning)
        notices.report([("a", "it is cast")], "Do this.")
    notices.reset()
    with warnings.catch_warnings(), pytest.raises(RanaWarning):
        warnings.simplefilter("error", UserWarning)
        notices.report([("a", "it is cast")], "Do this.")


def test_strict_raises_and_says_what_to_do():
    with pytest.raises(NotApplied, match="a: the plan is not applied here: it is cast.* Do this") as caught:
        given(("a", "it is cast"), strict=True)
    assert caught.value.facts == {"site": "a", "reason": "it is cast", "todo": "Do this."}
    assert given(strict=True) == []
