"""``rana-fx compare`` and ``rana-fx sweep``: tables, JSON, figures, and what each says is next."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import rana_fx
from rana_fx.cli import app
from rana_fx.commands import sweep_plot
from rana_fx.commands.held_out_text import rows_of
from rana_fx.commands.sweep import _table, _times
from rana_fx.curve import CurvePoint
from rana_fx.step_time import StepTime
from tests.cli.test_adapt_targets import Letters, summary, tiny  # noqa: F401 - a fixture
from tests.golden.interface import without_inductor


def call(*words):
    with without_inductor():
        return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):  # noqa: F811
    """(folder of plans, facts, output)."""
    model, text = tiny
    out = tmp_path_factory.mktemp("sweep")
    result = call(
        "sweep", model, "--data", text, "--context", 32, "--batch-size", 4, "--tokens", 512, "--recipe", "teal",
        "--device", "cpu", "--out", out / "plans", "--budgets", "0.4,0.9,0.6", "--json", out / "facts.json",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    return out / "plans", json.loads((out / "facts.json").read_text()), result.output


def test_plans_of_a_sweep_and_its_recommendation(swept):
    out, facts, printed = swept
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"0.4", "0.6", "0.9"}
    plans = [rana_fx.load_plan(out / name) for name in ("0.9", "0.6", "0.4")]
    assert [one["digest"] for one in facts["plans"]] == [plan.digest() for plan in plans]
    assert [point["budget"] for point in facts["curve"]["points"]] == [0.4, 0.6, 0.9]
    assert facts["expected_ms"] is None  # no GPU
    assert f"--plan {facts['recommended']}" in printed and facts["recommended"].startswith(str(out))
    if facts["knee"] is not None:
        assert facts["recommended"].endswith(f"{facts['knee']:g}") and "<- knee" in printed
    assert len(printed.splitlines()) <= 40 and all(len(line) <= 80 for line in summary(printed))


def test_the_figure(swept):
    pytest.importorskip("matplotlib")
    out, facts, printed = swept
    assert facts["figure"] == str(out / "sweep.png") and "figure" in printed
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_or_documents_there_is_a_table(tiny, tmp_path, monkeypatch):  # noqa: F811
    model, text = tiny
    words = ("sweep", model, "--context", 32, "--batch-size", 4, "--tokens", 256, "--recipe", "teal", "--device", "cpu")
    monkeypatch.setattr(sweep_plot, "has_matplotlib", lambda: False)
    result = call(*words, "--data", text, "--out", tmp_path / "a", "--budgets", "0.8,0.5")
    assert result.exit_code == 0 and "pip install 'rana-fx[plot]'" in result.output and "0.500" in result.output
    (tmp_path / "one.txt").write_text("The man went down to the sea. " * 100)
    result = call(*words, "--data", tmp_path / "one.txt", "--out", tmp_path / "b", "--budgets", "0.8,0.5")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "no knee: too few documents" in result.output and f"--plan {tmp_path / 'b' / '0.8'}" in result.output
    assert "held-out documents: 8 are needed" in " ".join(result.output.split())
    assert not (tmp_path / "b" / "sweep.png").exists()


def test_times_on_a_gpu_have_a_column_and_a_panel(tmp_path):
    points = [CurvePoint(0.8, 0.8, 0.8, None, None, None, 3, 9), CurvePoint(0.5, 0.5, 0.5, None, None, None, 3, 9)]
    columns, rows = _table(points, ([2.0, 1.0], 3.0), 1)
    assert columns[-2:] == ("ms a token", "") and [row[-2:] for row in rows] == [(2.0, ""), (1.0, "<- knee"), (3.0, "")]


def test_times_are_those_of_each_plan(monkeypatch):
    """On a machine without a GPU: the device is one, and what asks the cost model for a layout is replaced."""
    seen = []

    class Network:
        device = type("Device", (), {"type": "cuda"})

    def step(layout, plan, device):
        seen.append((layout, plan))
        return StepTime({"a": plan}, {"a": 4000.0}, 1000.0, 1000.0)

    class Found:
        layout = "a layout"

    monkeypatch.setattr("rana_fx.calibration.calibrate.calibrate", lambda network, batches, progress: Found)
    monkeypatch.setattr("rana_fx.step_time.step_time", step)
    assert _times(Network, [{}], [2000.0, 1000.0]) == ([3.0, 2.0], 5.0)
    assert seen == [("a layout", 2000.0), ("a layout", 1000.0)]


def test_compare_prints_a_dozen_lines(tiny, swept, tmp_path):  # noqa: F811
    model, text = tiny
    words = ("compare", model, "--plan", swept[0] / "0.6", "--data", text, "--context", 32, "--tokens", 512, "--new-tokens", 2)
    result = call(*words, "--device", "cpu", "--json", tmp_path / "facts.json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "facts.json").read_text())["comparison"]
    assert found["documents"] == 16 and found["tokens"] == 512 and found["plan"] in result.output
    printed = result.stdout.splitlines()
    assert len(printed) <= 20 and all(len(line) <= 80 for line in summary(result.stdout))
    assert any(line.startswith("next: rana-fx generate") for line in printed)
    quiet = call(*words, "--device", "cpu", "--quiet")
    assert quiet.exit_code == 0 and quiet.output == ""


def test_rows_to_compare_on():
    texts = [chr(0x4E00 + index) * 5 for index in range(20)]
    batches, independent = rows_of(texts, Letters(), tokens=10, context=4, batch_size=2)
    assert independent and sum(len(batch["input_ids"]) for batch in batches) == 8  # documents that intervals need
    batches, independent = rows_of(texts, Letters(), tokens=40, context=4, batch_size=2)
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == 40
    batches, independent = rows_of(texts[:3], Letters(), tokens=10, context=4, batch_size=2)
    assert not independent and sum(int(batch["attention_mask"].sum()) for batch in batches) == 10
