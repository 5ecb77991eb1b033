"""bench.reproduce from a model folder to its report, on a model of one tiny block; a second run adds no rows."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
import typer

import rana_fx
from bench.common.documents import read_text
from bench.quality import finetuned, report, reproduce, study
from bench.quality.divergence import by_document
from bench.quality.report import increase_left
from bench.speed import decode
from rana_fx.commands.record import cell
from rana_fx.evaluation.perplexity import evaluate, load_model
from rana_fx.evaluation.text import load_texts
from tests.support.tiny_model import CHOICE, saved_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a folder with a tiny model, a text, a folder with a task)."""
    folder = tmp_path_factory.mktemp("tiny")
    model, text = saved_tiny(folder, layers=1)
    tasks = folder / "tasks"
    tasks.mkdir()
    words = load_texts(text)[0].split()
    rows = [{"start": " ".join(words[i : i + 20]), "ends": words[i + 20 : i + 23], "label": 0} for i in range(6)]
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tasks / "choice.yaml").write_text(CHOICE.format(data=tasks / "rows.jsonl"))
    return str(model), str(text), tasks


@pytest.fixture(scope="module")
def run(saved, tmp_path_factory):
    """Calls the bench with further options and returns its rows. The report of each call has its figure if it is ``drawn``."""
    model, text, tasks = saved
    folder = tmp_path_factory.mktemp("out")

    def call(*, drawn=False, **options):
        given = {
            "stages": "quality,mlp,finetune,tasks", "recipes": "paper", "budgets": "0.6", "tokens": 1024, "eval_tokens": 512,
            "mlp_tokens": 256, "context": 64, "train_tokens": 64 * 4 * 8, "train_batch": 4, "rate": "auto", "rates": "1e-4,1e-2",
            "search": 0.5, "held_out": 256, "compile": False, "tasks": "local_choice", "include": tasks,
        }  # fmt: skip
        out = folder / "rows.jsonl"
        with pytest.MonkeyPatch.context() as patch:
            if not drawn:
                patch.setattr(report, "plot", lambda *_: False)
            reproduce.main(model, calib=text, text=[text], train=text, out=out, work=folder / "work", **given | options)
        return [json.loads(line) for line in out.read_text().splitlines()]

    call.out = folder / "rows.jsonl"
    return call


@pytest.fixture(scope="module")
def rows(run):
    """Rows of one run by stage; the run was interrupted after the training of the dense model, and started again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuned, "merge_lora", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    before = run.out.read_text()
    found = {}
    for row in run():
        found.setdefault(row["stage"], []).append(row)
    assert run.out.read_text().startswith(before)
    return found


def interrupted(*_):
    raise KeyboardInterrupt


def test_every_stage_has_its_rows(rows):
    assert [(row["recipe"], row["budget"]) for row in rows["quality"]] == [("dense", 1.0), ("paper", 0.6)]
    assert {row["recipe"] for row in rows["mlp"]} == {"paper", "neuron_ideal"}
    assert all(0 < row["error"] < 1 and len(row["blocks"]) == 1 for row in rows["mlp"])
    assert {need["basis"] for need in rows["ranks"][0]["needs"]} == {"rank", "neuron"}
    states = [(row["recipe"], row["state"]) for row in rows["tasks"]]
    assert states == [(name, state) for name in ("dense", "paper") for state in ("untrained", "trained")]
    assert all(0 <= row["scores"]["local_choice"]["acc"] <= 1 for row in rows["tasks"])
    assert len({row["key"] for found in rows.values() for row in found}) == sum(map(len, rows.values()))


def test_training_lowers_the_loss_and_keeps_the_budget(rows):
    dense = rows["finetune"][0]
    assert [row["recipe"] for row in rows["finetune"]] == ["dense", "paper"]
    assert [row["resumed"] for row in rows["finetune"]] == [True, False]
    for row, asked in zip(rows["finetune"], (1.0, 0.6), strict=True):
        (result,) = row["results"].values()
        # a random model, eight steps: any useful learning rate lowers its loss by much
        assert result["after"]["mean_loss"] < result["before"]["mean_loss"] - 0.1
        assert result["after"]["measured"]["flops"] == pytest.approx(asked, abs=0.05)
        assert row["rate"] == min((0.0001, 0.01), key=lambda rate: row["tried"][f"{rate:g}"])
        assert (row["steps"], row["tokens_trained"]) == (8, 64 * 4 * 8)
        # the resumed training has no further steps, so no time per step
        assert (row["tokens_per_s"] or 0) > 0 or row["resumed"]
        before = next(found for found in rows["quality"] if found["recipe"] == row["recipe"])
        increase, remains, low, high, share = increase_left(result, next(iter(dense["results"].values())))
        assert low <= remains <= high and increase == pytest.approx(before["delta"], abs=1e-6)
        assert share is None or share == pytest.approx(remains / increase)


def test_a_trained_model_is_where_tasks_find_it(rows, saved, run):
    row = next(row for row in rows["tasks"] if row["recipe"] == "paper" and row["state"] == "trained")
    folder = run.out.parent / "work" / row["trained"]
    network, tokenizer = load_model(str(folder / "model"), dtype="float32")
    plan = rana_fx.load_plan(folder / "plan")
    rana_fx.attach(network, plan)
    tuned = next(found for found in rows["finetune"] if found["recipe"] == "paper")
    assert plan.digest()[:12] == tuned["digest"]
    text = read_text(saved[1], tokenizer, tokens=512, context=64)
    quality = rana_fx.evaluation.perplexity.evaluate_adapted(network, text.batches, progress=False)[0]
    assert quality.mean_loss == pytest.approx(next(iter(tuned["results"].values()))["after"]["mean_loss"], rel=1e-6)


def test_existing_rows_are_not_computed_again(rows, run, monkeypatch):
    written = run.out.read_text()
    whole = written.splitlines()
    # cut off in the middle of the last row
    run.out.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:50])
    assert [row["key"] for row in run(stages="tasks")] == [json.loads(line)["key"] for line in whole]
    monkeypatch.setattr(study, "load_model", lambda *_, **__: pytest.fail("loaded"))
    before = run.out.read_text()
    run()
    assert run.out.read_text() == before
    monkeypatch.undo()
    # only rows with the changed setting
    more = run(stages="quality", budgets="0.6,0.2", recipes="cats")[len(whole) :]
    assert [(row["recipe"], row["budget"]) for row in more] == [("cats", 0.6), ("cats", 0.2)]
    assert "unreachable" in more[1] and "cats: budget=0.200 cannot be reached" in run.out.with_suffix(".md").read_text()


def test_a_plan_whose_save_was_killed_is_made_again(rows, run):
    (folder,) = (run.out.parent / "work").glob("plan-paper-0.6-*")
    header = (folder / "plan.json").read_bytes()
    (folder / "plan.json").unlink()
    run.out.write_text(
        "".join(line + "\n" for line in run.out.read_text().splitlines() if json.loads(line)["stage"] != "quality")
    )
    run(stages="quality")
    assert json.loads((folder / "plan.json").read_bytes())["digest"] == json.loads(header)["digest"]


def test_rows_of_another_commit_are_computed_again_unless_asked(rows, run, monkeypatch):
    def loaded(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(study, "load_model", loaded)
    monkeypatch.setenv("RANA_FX_COMMIT", "f" * 40)
    run(stages="quality", any_commit=True)
    with pytest.raises(InterruptedError):
        run(stages="quality")


def test_latency_times_every_plan(rows, run, monkeypatch):
    calls = []

    def fake(model, **options):
        inspect.signature(decode.main).bind(model, **options)
        calls.append(options)
        times = {"tokens_per_s": 10.0, "ms_per_token": {"p50": 100.0}, "compile_seconds": 1.0, "peak_gb": None, "batch": 1}
        names = [{"variant": "eager"}, *({"variant": "rana 0.6", "plan": path.name} for path in options["plan"])]
        options["out"].write_text("".join(json.dumps({"kind": "decode", **name, **times}) + "\n" for name in names))

    monkeypatch.setattr(decode, "main", fake)
    run(stages="latency", variants="eager,rana")
    run(stages="latency", variants="eager,rana")
    assert len(calls) == 1
    plans = [rana_fx.load_plan(path) for path in calls[0]["plan"]]
    assert [(plan.recipe, plan.budget) for plan in plans] == [("paper", 0.6)]
    assert "| paper 0.6 | 1 | 10.0000 |" in run.out.with_suffix(".md").read_text()


def test_the_report_shows_values_of_the_rows(rows, run):
    run(stages="report", drawn=True)
    text = run.out.with_suffix(".md").read_text()
    for title in (
        "Loss before training",
        "Loss after training",
        "Downstream tasks",
        "Errors of MLP outputs",
        "Components that an input needs",
    ):
        assert f"## {title}" in text
    paper = next(row for row in rows["quality"] if row["recipe"] == "paper")
    assert f"| {cell(paper['perplexity'])} |" in text and paper["commit"][:7] in text
    assert run.out.with_suffix(".png").stat().st_size > 10_000


def test_wrong_options_are_refused_before_calibration(run, monkeypatch):
    monkeypatch.setattr(study, "load_model", lambda *_, **__: pytest.fail("too late"))
    for wrong, match in (
        ({"stages": "quality,speed"}, "unknown stages.*speed.*quality, mlp"),
        ({"recipes": "papper"}, "unknown recipes.*papper"),
        ({"method": "soap"}, "unknown method 'soap'.*lora"),
        ({"metric": "watts"}, "unknown metric"),
    ):
        with pytest.raises(typer.BadParameter, match=match):
            run(**wrong)
    with pytest.raises(typer.BadParameter, match="needs --train"):
        reproduce.main("m", calib="c", text=["t"], out=run.out, stages="finetune")


def test_losses_by_document_add_up_to_the_loss_of_the_text(saved):
    model, text, _ = saved
    network, tokenizer = load_model(model, dtype="float32")
    found = read_text(text, tokenizer, tokens=1000, context=64)
    sums, counts = by_document(network, found, device=network.device)
    quality = evaluate(network, found.batches, progress=False)
    assert int(counts.sum()) == quality.tokens and len(counts) > 1
    assert float(sums.sum() / counts.sum()) == pytest.approx(quality.mean_loss, rel=8 * torch.finfo(torch.float32).eps)
