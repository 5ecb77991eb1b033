"""Progress of work in stages: fractions, estimates, one bar from start to end, the log, and every step of ``adapt``."""

from __future__ import annotations

import logging

import pytest
import torch

import rana_fx
from rana_fx import progress
from rana_fx.errors import InvalidOption
from rana_fx.progress import Bar, Progress, Step, clock, following
from tests.support.architectures import build, ids


@pytest.fixture
def clocked(monkeypatch):
    """A clock that only the test advances."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_fractions_follow_shares_and_time_left_follows_fractions(clocked):
    seen: list[Step] = []
    steps = Progress(seen.append, {"a": 1.0, "b": 3.0}, _started=0.0)
    with steps.stage("a"):
        for _ in steps.each([1, 2]):
            clocked[0] += 1.0
    with steps.stage("b"):
        steps.expect(3)
        clocked[0] += 2.0
        steps.advance()
    assert [(step.stage, step.done, step.total) for step in seen[:4]] == [
        ("a", 0, None), ("a", 1, 2), ("a", 2, 2), ("a", 0, None),
    ]  # fmt: skip
    assert [step.fraction for step in seen] == [0.0, 0.125, 0.25, 0.25, 0.25, 0.5, 1.0]
    assert [step.left_s for step in seen] == [None, 7.0, 6.0, 6.0, 6.0, 4.0, 0.0]
    assert {(step.index, step.stages) for step in seen if step.stage == "b"} == {(2, 2)}


@pytest.mark.parametrize("items", [iter(range(40)), [0] * 40])
def test_a_fraction_never_falls_and_ends_at_one(items):
    seen: list[Step] = []
    steps = Progress(seen.append, {"a": 1.0, "b": 1.0})
    with steps.stage("a"):
        assert len(list(steps.each(items))) == 40
        steps.expect(1000)  # more than was thought
        steps.advance()
    with steps.stage("b"):
        pass
    fractions = [step.fraction for step in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert 0.3 < fractions[40] <= 0.5


def test_part_of_other_work_and_nobody_to_tell():
    with following(False, title="x", shares={}) as silent:
        assert not silent and list(silent.each("ab")) == ["a", "b"]
        with following(silent, title="y", shares={}) as same:
            assert same is silent


def test_the_bar_is_one_line_with_stage_and_time_left(capsys, clocked):
    with following(True, title="adapt", shares={"calibrate": 1.0, "solve": 1.0}) as steps:
        with steps.stage("calibrate"):
            steps.expect(2)
            clocked[0] += 30
            steps.advance()
            clocked[0] += 30
        with steps.stage("solve"):
            clocked[0] += 60
    drawn = capsys.readouterr().err
    assert "1/2 calibrate" in drawn and "1:30 left" in drawn and "2/2 solve 100%" in drawn
    assert drawn.count("\n") == 1 and all(len(line) <= 80 for line in drawn.strip().split("\r"))


def test_stages_are_logged(caplog):
    caplog.set_level(logging.INFO, "rana_fx")
    with following(False, title="adapt", shares={}) as steps, steps.stage("calibrate"):
        pass
    assert [record.name for record in caplog.records] == ["rana_fx.progress"] * 2
    assert caplog.messages[0] == "adapt: calibrate" and caplog.messages[1].startswith("adapt: calibrate took 0.")


def test_clock():
    assert [clock(seconds) for seconds in (0.4, 65, 3600 + 62)] == ["0:00", "1:05", "1:01:02"]


@pytest.mark.parametrize("recipe", ["rana", "paper", "teal"])
def test_adapt_tells_of_every_stage_from_start_to_end(recipe, capsys):
    torch.manual_seed(0)
    seen: list[Step] = []
    batches = [ids(24) for _ in range(9)]
    rana_fx.adapt(build("plain_llama", 1)[0], batches, budget=0.7, recipe=recipe, progress=seen.append)
    assert capsys.readouterr().err == ""
    stages = list(dict.fromkeys(step.stage for step in seen))
    inside = ["gradients", "decompose", "allocate", "build"] if recipe == "rana" else ["solve"]
    assert stages == ["calibrate", *inside, "plan"]
    assert seen[0].fraction == 0 and seen[-1].fraction == 1 and seen[-1].left_s == 0
    fractions = [step.fraction for step in seen]
    assert fractions == sorted(fractions)
    # held-out batches are counted, and each stage has steps of its own
    assert max(step.done for step in seen if step.stage == "calibrate") == 9
    assert all(any(step.done for step in seen if step.stage == name) for name in stages[:-1])


def test_the_end_is_one_in_any_order_of_the_stages():
    """.3 + .2 + .1 is less than .1 + .2 + .3, and Python 3.12 sums floats more exactly than a loop."""
    seen: list[Step] = []
    steps = Progress(seen.append, {"a": 0.1, "b": 0.2, "c": 0.3})
    for name in ("c", "b", "a"):
        with steps.stage(name):
            pass
    assert seen[-1].fraction == 1 and seen[-1].left_s == 0


def test_a_callback_that_raises_ends_the_work_and_leaves_the_model_as_it_was():
    model, _ = build("plain_llama", 1)
    state = set(model.state_dict())

    def stop(step: Step) -> None:
        if step.stage == "solve":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rana_fx.adapt(model, [ids() for _ in range(3)], budget=0.7, recipe="teal", progress=stop)
    assert set(model.state_dict()) == state and rana_fx.detach(model) is None


def test_progress_is_a_bool_or_a_function():
    with pytest.raises(InvalidOption, match="option progress='yes' is not valid: expected True, False or a function"):
        rana_fx.adapt(build("plain_llama", 1)[0], [], progress="yes")


def test_a_bar_may_be_closed_early():
    Bar("x").close()


def test_a_stage_without_a_share_is_part_of_the_one_around_it(clocked):
    seen: list[Step] = []
    steps = Progress(seen.append, {"a": 1.0, "plans": 2.0, "b": 1.0}, _started=0.0)
    with steps.stage("plans"):
        steps.expect(2)
        for _ in range(2):
            with pytest.raises(KeyError), steps.stage("inner"):
                list(steps.each([1, 2, 3]))
                raise KeyError
            steps.advance()
    inner = [step for step in seen if step.stage == "inner"]
    assert [(step.done, step.total) for step in inner[:4]] == [(0, None), (1, 3), (2, 3), (3, 3)]
    assert {(step.index, step.stages) for step in seen} == {(2, 3)}
    assert [step.fraction for step in inner] == [0.0] * 4 + [0.25] * 4
    assert [step.fraction for step in seen if step.stage == "plans"] == [0.0, 0.25, 0.5, 0.5]
