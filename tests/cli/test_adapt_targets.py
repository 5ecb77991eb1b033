"""``rana-fx adapt`` with several budgets or a target: folders, tables, JSON, held-out documents, messages."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

import rana_fx
from rana_fx.cli import app
from rana_fx.commands.held_out_text import MOST, calibration_and_held_out, refinement_batches
from rana_fx.errors import InvalidOption, RanaWarning
from rana_fx.evaluation.text import token_batches
from tests.support.tiny_model import saved_tiny


def summary(output):
    """Lines but those that name files, which are never shortened."""
    return [line for line in output.splitlines() if "/" not in line]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, text of forty documents)."""
    folder = tmp_path_factory.mktemp("tiny")
    model, _ = saved_tiny(folder, layers=1)
    rows = [{"text": f"The {word} of {number} went down to the sea and saw it. " * 6} for number in range(10) for word in
            ("man", "dog", "king", "old house")]  # fmt: skip
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return model, folder / "text.jsonl"


def adapt(tiny, *words):
    model, text = tiny
    words = ("adapt", model, "--data", text, "--context", 32, "--batch-size", 4, "--recipe", "teal", "--device", "cpu", *words)
    return CliRunner().invoke(app, list(map(str, words)))


def test_a_folder_for_each_budget(tiny, tmp_path):
    result = adapt(tiny, "--out", tmp_path / "plans", "--budgets", "0.8,0.5", "--tokens", 512, "--json", tmp_path / "facts.json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert {path.name for path in (tmp_path / "plans").iterdir()} == {"0.8", "0.5"}
    plans = [rana_fx.load_plan(tmp_path / "plans" / name) for name in ("0.8", "0.5")]
    assert [plan.budget for plan in plans] == [0.8, 0.5]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert [found["digest"] for found in facts["plans"]] == [plan.digest() for plan in plans]
    assert "on 10 held-out documents (320 tokens; 95 % intervals)" in result.output
    assert len(result.output.splitlines()) <= 40 and all(len(line) <= 80 for line in summary(result.output))
    # calibrated on the text that --budget alone is calibrated on
    result = adapt(tiny, "--out", tmp_path / "alone", "--budget", 0.5, "--tokens", 512)
    assert result.exit_code == 0, result.output
    alone = rana_fx.load_plan(tmp_path / "alone")
    assert alone.curve is None and alone.tokens == plans[1].tokens == 512
    taus = [[adapter.tau.tolist() for adapter in plan.adapters] for plan in (alone, plans[1])]
    assert taus[0] == taus[1]


def test_a_target_and_its_promise(tiny, tmp_path):
    result = adapt(tiny, "--out", tmp_path, "--max-kl", 0.5, "--tokens", 512)
    assert result.exit_code == 0, (result.output, result.exception)
    plan = rana_fx.load_plan(tmp_path)
    assert plan.curve.promise.limit == 0.5 and plan.curve.at(plan.budget).kl.high <= 0.5
    assert "promised KL divergence, nats per token: at most 0.5" in result.output
    assert len(result.output.splitlines()) <= 40 and all(len(line) <= 80 for line in summary(result.output))


def test_options_in_a_file_yield_to_given_ones_and_exclude_each_other(tiny, tmp_path, monkeypatch):
    asked = []

    def stop(*_, **options):
        asked.append({name: value for name, value in options.items() if "max" in name or "budget" in name})
        raise InvalidOption(name="x", got=1, expected="no more")

    monkeypatch.setattr("rana_fx.adaptation.adapt", stop)
    for content, words, given in (
        ("budget: 0.3", (), {"budget": 0.3}),
        ("budget: 0.3", ("--max-kl", 0.1), {"max_kl": 0.1}),
        ("budgets: [0.3, 0.5]", (), {"budgets": [0.3, 0.5]}),
        ("adapt: {max-loss: 0.2}", ("--budgets", "0.4"), {"budgets": [0.4]}),
        ("", (), {}),
    ):
        (tmp_path / "run.yaml").write_text(content)
        result = adapt(tiny, "--out", tmp_path / "out", "--tokens", 512, "--config", tmp_path / "run.yaml", *words)
        assert asked.pop() == given, result.output
    (tmp_path / "run.yaml").write_text("budget: 0.3\nmax-kl: 0.1")
    result = adapt(tiny, "--out", tmp_path / "out", "--config", tmp_path / "run.yaml")
    assert result.exit_code == 2 and "got budget=0.3, max_kl=0.1 together" in " ".join(result.output.split()) and not asked


def test_refined_on_text_after_that_of_calibration(tiny, tmp_path):
    words = ("--budget", 0.5, "--tokens", 512, "--refine", 600)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RanaWarning)  # a random model on few tokens may gain nothing
        result = adapt(tiny, "--out", tmp_path, *words, "--json", tmp_path / "facts.json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads((tmp_path / "facts.json").read_text())["options"]["refine"] == 600
    note = rana_fx.load_plan(tmp_path).notes()[-1]
    assert "refined" in note and note[:30] in result.output
    result = adapt(tiny, "--out", tmp_path, "--recipe", "exact", "--refine", 600)
    assert "recipe exact approximates nothing, so there is nothing to train" in " ".join(result.output.split())


def test_text_to_refine_on_follows_that_of_calibration():
    texts = ["a" * 9, "b" * 19, *"c" * 400]
    options = {"context": 2, "batch_size": 5}
    seen = token_batches(texts, Letters(), tokens=25, **options)
    others = refinement_batches(texts, Letters(), after=25, tokens=90, measured=False, **options)
    whole = token_batches(texts, Letters(), tokens=30 + 120, **options)
    assert len(seen) == 3 and len(others) == 12
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(others, whole[3:], strict=True))
    # with documents that plans are measured on, without these
    fewer = refinement_batches(texts, Letters(), after=25, tokens=10_000, measured=True, **options)
    assert sum(int(batch["attention_mask"].sum()) for batch in fewer) == 30 + 2 * (400 - MOST) - 30
    assert refinement_batches(texts, Letters(), after=800, tokens=90, measured=False, **options) is None


class Letters:
    """A tokenizer: a token for each letter."""

    pad_token_id, eos_token_id, sep_token_id = 0, 1, None

    def __call__(self, texts, verbose):  # noqa: ARG002
        return {"input_ids": [[2 + ord(letter) for letter in text] for text in texts]}


def test_rows_are_the_beginnings_of_documents_that_calibration_does_not_see():
    texts = [chr(0x4E00 + index) * (3 + index % 9) for index in range(40)]
    batches, held_out = calibration_and_held_out(texts, Letters(), tokens=10_000, context=6, batch_size=4)
    assert held_out is not None
    rows = [row[mask.bool()].tolist() for batch in held_out for row, mask in zip(*batch.values(), strict=True)]
    whole = [[*Letters()([text], verbose=False)["input_ids"][0], 1][:6] for text in texts[-10:]]
    assert rows == whole
    seen = {token for batch in batches for token in batch["input_ids"].flatten().tolist()}
    assert not seen & {row[0] for row in rows} and {2 + ord(text[0]) for text in texts[:-10]} <= seen
    assert all(batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() for batch in held_out)


def test_a_text_of_few_documents_is_withheld_by_batches():
    batches, held_out = calibration_and_held_out(["word " * 100] * 31, Letters(), tokens=500, context=50, batch_size=2)
    assert held_out is None and len(batches) == 5
    _, held_out = calibration_and_held_out(["word"] * 1000, Letters(), tokens=500, context=50, batch_size=50)
    assert sum(len(batch["input_ids"]) for batch in held_out) == MOST
