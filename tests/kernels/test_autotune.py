"""Autotuning: the fastest choice is cached by bucket in a file; choices that fail are left out."""

from __future__ import annotations

import json

import pytest
import torch

from rana_fx.kernels.autotune import bucket, copies_of, fastest

TIMES = {"a": 3.0, "b": 1.0, "c": 2.0}


def test_the_fastest_is_remembered_across_processes(tmp_path):
    file = tmp_path / "deep" / "tuned.json"
    assert fastest("key", list("abc"), TIMES.__getitem__, file=file) == "b"

    def never(choice):
        raise AssertionError(choice)

    # another process only has the file
    assert fastest("key", list("abc"), never, file=file) == "b"
    assert json.loads(file.read_text()) == {"key of 3": 1}
    # other shapes and other numbers of choices are measured separately
    assert fastest("other", list("ac"), TIMES.__getitem__, file=file) == "c"
    assert fastest("key", list("ab"), {"a": 0.0, "b": 1.0}.__getitem__, file=file) == "a"
    assert set(json.loads(file.read_text())) == {"key of 3", "other of 2", "key of 2"}
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"key of 3": 7}', '{"key of 3": "b"}'])
def test_a_file_that_is_not_ours_is_measured_anew(tmp_path, content):
    file = tmp_path / "tuned.json"
    file.write_text(content)
    assert fastest("key", list("abc"), TIMES.__getitem__, file=file) == "b"


def test_what_fails_is_left_out_and_nothing_is_remembered_of_nothing(tmp_path):
    file = tmp_path / "tuned.json"

    def measure(choice):
        if choice != "c":
            raise RuntimeError("too much shared memory")
        return 1.0

    assert fastest("key", list("abc"), measure, file=file) == "c"
    assert fastest("none", list("ab"), measure, file=file) == "a"
    assert set(json.loads(file.read_text())) == {"key of 3"}


@pytest.mark.parametrize(("second", "chosen"), [(0.96, "a"), (0.94, "b")])
def test_a_choice_has_to_win_by_more_than_its_surroundings_change(tmp_path, second, chosen):
    times = {"a": 1.0, "b": second, "c": 0.99}
    assert fastest("key", list("abc"), times.__getitem__, file=tmp_path / "tuned.json") == chosen


def test_layers_that_differ_by_a_few_ranks_share_a_bucket():
    bf16 = torch.bfloat16
    assert bucket(2448, 12288, 1, 0.5, 16, bf16) == bucket(2560, 12288, 1, 0.52, 16, bf16)
    different = [(4096, 12288, 1, 0.5, 16), (2448, 4096, 1, 0.5, 16), (2448, 12288, 2, 0.5, 16), (2448, 12288, 1, 0.3, 16)]
    names = {bucket(*facts, bf16) for facts in [(2448, 12288, 1, 0.5, 16), (2448, 12288, 1, 0.5, 8), *different]}
    assert len(names) == 6


@pytest.mark.parametrize(("megabytes", "copies"), [(1000, 2), (50, 4), (1, 200), (0.001, 256), (0, 256)])
def test_copies_exceed_l2_but_are_never_thousands(megabytes, copies):
    assert copies_of(1e6 * megabytes) == copies
