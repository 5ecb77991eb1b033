"""The report of bench.reproduce: the increase left is relative to the dense model trained with the same settings."""

from __future__ import annotations

import json

import pytest

from bench.common.result_store import ResultStore, whole_rows
from bench.quality.report import increase_left, markdown, write_report

HEAD = {"bench": "reproduce", "command_line": "python -m bench.quality.reproduce m", "commit": "a" * 40, "dirty": False,
        "versions": {"torch": "2.13"}, "device": "cpu", "model": "m"}  # fmt: skip


def losses(before, sums):
    counts = [10.0] * len(sums)
    measured = {"flops": 0.5, "bytes": 0.5}
    return {
        "before": {"mean_loss": before, "measured": measured},
        "after": {"mean_loss": sum(sums) / sum(counts), "measured": measured, "sums": sums, "counts": counts},
    }


def row(recipe, budget, result, trained_as):
    speed = {"tokens_per_s": 100.0 if recipe == "dense" else 75.0, "peak_gb": None, "rate": 1e-3, "tokens_trained": 640}
    facts = {"stage": "finetune", "key": f"{recipe}{trained_as}", "recipe": recipe, "budget": budget, "metric": "flops"}
    return HEAD | facts | speed | {"trained_as": trained_as, "results": {"valid": result}}


def test_the_increase_left_is_relative_to_the_trained_dense_model():
    # every document is 0.1 nats per token above the dense model: the interval has width zero
    increase, remains, low, high, share = increase_left(losses(3.5, [31.0, 21.0]), losses(3.0, [30.0, 20.0]))
    assert (increase, remains, share) == pytest.approx((0.5, 0.1, 0.2))
    assert (low, high) == pytest.approx((0.1, 0.1))
    _, remains, low, high, _ = increase_left(losses(3.5, [33.0, 20.0]), losses(3.0, [30.0, 20.0]))
    assert remains == pytest.approx(0.15) and (low, high) == pytest.approx((0.0, 0.3))


def test_the_reference_is_the_dense_model_of_the_same_settings(tmp_path):
    rows = [
        row("dense", 1.0, losses(3.0, [28.0, 18.0]), "one"),
        row("paper", 0.5, losses(3.5, [31.0, 21.0]), "one"),
        # a later dense run with other settings is not a reference
        row("dense", 1.0, losses(3.0, [10.0, 10.0]), "two"),
    ]
    (line,) = [line for line in markdown(rows, None, "rows.jsonl").splitlines() if line.startswith("| valid | paper")]
    assert line.split(" | ")[6:] == ["0.5000", "0.3000", "0.3000", "0.3000", "0.6000 |"]
    assert "| paper | 0.5000 | 0.001 | 640 | 75.0000 | 0.7500 |" in markdown(rows, None, "rows.jsonl")
    # times of two machines are not comparable
    elsewhere = markdown([rows[0] | {"device": "another"}, *rows[1:]], None, "rows.jsonl")
    assert "| paper | 0.5000 | 0.001 | 640 | 75.0000 | - |" in elsewhere and "0.6000 |" in elsewhere
    (alone,) = [line for line in markdown(rows[1:], None, "x").splitlines() if line.startswith("| valid | paper")]
    assert alone.endswith("| - | - | - | - | - |")
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(found) + "\n" for found in rows))
    assert write_report(out).read_text().startswith("# m: ") and out.with_suffix(".png").stat().st_size > 1000


def test_a_report_without_rows_says_so(tmp_path):
    assert "no rows yet" in write_report(tmp_path / "rows.jsonl").read_text()
    assert not (tmp_path / "rows.png").exists()


def test_rows_are_valid_by_settings_and_commit_and_an_incomplete_line_is_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    store = ResultStore(path, HEAD)
    store.add("quality", {"recipe": "paper", "budget": 0.5}, {"delta": float("inf")})
    path.write_text(path.read_text() + '{"bench": "repro')
    for common, any_commit, expected in (
        (HEAD, False, True),
        (HEAD | {"commit": "b" * 40}, False, False),
        (HEAD | {"dirty": True}, False, False),
        (HEAD | {"commit": "b" * 40}, True, True),
    ):
        assert ResultStore(path, common, any_commit=any_commit).has("quality", {"budget": 0.5, "recipe": "paper"}) == expected
    again = ResultStore(path, HEAD)
    assert not again.has("mlp", {"recipe": "paper", "budget": 0.5}) and not again.has(
        "quality", {"recipe": "paper", "budget": 0.4}
    )
    again.add("mlp", {"recipe": "paper", "budget": 0.5}, {})
    assert [found["stage"] for found in whole_rows(path)] == ["quality", "mlp"]
