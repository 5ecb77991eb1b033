"""demo, generate, finetune, tasks and env print at most 40 lines of 80 columns, say what the numbers are, and what is next."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rana_fx.cli import app
from rana_fx.commands import demo, env, finetune, tasks
from rana_fx.commands.generate import _Live
from rana_fx.commands.screen import LEGEND, Screen
from rana_fx.evaluation.generate import generate
from rana_fx.evaluation.perplexity import load_model
from tests.cli.test_cli import adapted, call, model  # noqa: F401 - fixtures
from tests.cli.test_short_output import lines_of, plan  # noqa: F401 - a fixture
from tests.golden.interface import without_inductor

TEXT = " and the old man sat by the fire, \n\nand the night was dark" * 20


def printed(capsys, most=40):
    lines = lines_of(capsys.readouterr().out)
    assert 0 < len(lines) <= most
    return lines


def demonstrated(speedup):
    times = {"text": TEXT, "ms_per_token": 5.0, "compile_seconds": 30.0}
    quality = {"perplexity": 23.0, "mean_loss": 3.1, "tokens": 4000}
    return {
        "model": "tiny-llama-prose-5m", "device": "cuda:0", "dtype": "bfloat16", "recipe": "rana",
        "quality": {"dense": quality, "adapted": quality | {"perplexity": 27.0}}, "perplexity_ratio": 27 / 23,
        "budget": {"asked": 0.58, "metric": "flops", "measured": {"flops": 0.575, "bytes": 0.58}},
        "generation": {"prompt": "It was", "dense": times, "adapted": times | {"ms_per_token": 5 / speedup}},
        "speedup": speedup, "adapt_seconds": 17.0, "seconds": 93.0, "note": "On a GPU, layers as small as this " * 6,
    }  # fmt: skip


@pytest.mark.parametrize("speedup", [0.5, 2.0])
def test_the_demo(speedup, plan, capsys):  # noqa: F811
    demo.show(Screen(), demonstrated(speedup), plan, every_adapter=False)
    lines = printed(capsys, most=35)  # five more, a step each, come before
    assert LEGEND[0] in lines and any(line.startswith("next: rana-fx sweep MODEL") for line in lines)
    assert any(line.startswith("adapted: It was and the old man") for line in lines)
    words = "nothing is gained in speed" if speedup < 1 else "decoding is 2.00 times as fast"
    assert any(words in line for line in lines)
    demo.show(Screen(), demonstrated(speedup), plan, every_adapter=True)
    assert all(adapter.name in capsys.readouterr().out for adapter in plan.adapters[:1])


def test_fine_tuning(capsys):
    record = {
        "model": "tuned/model", "plan": "tuned/plan", "loss": {"dense": 3.0, "before": 3.5, "after": 3.1}, "steps": 100,
        "tokens": 409_600, "digest": "ab" * 32, "rate": 1e-4, "rates": {"3e-05": 3.2, "0.0001": 3.1, "0.0003": 3.3, "0.001": 4.0},
        "budget": {"asked": 0.5, "metric": "flops", "measured": {"flops": 0.51, "bytes": 0.52}},
    }  # fmt: skip
    finetune._show(Screen(), "a/model/of/a/name", record, 100.0)
    lines = printed(capsys)
    assert ["held-out", "loss,", "fine-tuned", "3.1000"] in [line.split() for line in lines]
    assert any(line.startswith("next: rana-fx compare tuned/model --plan tuned/plan") for line in lines)
    assert any("nats a token" in line for line in lines)


@pytest.mark.parametrize(("count", "every", "shown", "left"), [(6, False, 12, 0), (57, False, 30, 84), (57, True, 114, 0)])
def test_scores_of_many_tasks(count, every, shown, left):
    scores = {f"task_{i}": {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.6, "acc_norm_stderr": 0.02} for i in range(count)}
    columns, rows, left_out = tasks.table(scores, every=every)
    assert (len(rows), left_out) == (shown, left) and len(columns) == 4
    assert rows[0] == ("task_0", "acc", 0.5, 0.01) and rows[1][:2] == (("task_1", "acc") if left else ("task_0", "acc_norm"))


def test_the_environment_with_kernels_that_are_not_used(monkeypatch, capsys, tmp_path):
    passed = {"triton": "no CUDA device", "cuda": "compute capability 8.0, and tensor cores need 9.0 or later, which this is not"}
    monkeypatch.setattr(env, "choices", lambda: [env.Choice("cpu", bits, "cpp", passed) for bits in (16, 8, 4)])
    monkeypatch.setattr(env, "machine", lambda: {"C++ compiler": "none (no g++ of version 11 or later)", "GPU": "none"})
    env.command(json=tmp_path / "env.json")
    lines = printed(capsys)
    # nothing is cut: a report of a fault should have it whole
    assert "which this is not)" in " ".join(" ".join(lines).split()) and any(line.startswith("next: ") for line in lines)
    assert json.loads((tmp_path / "env.json").read_text())["kernels"][0]["passed"] == passed
    env.command(quiet=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_generated_text_is_followed_by_its_time_and_what_is_next(quiet, model, adapted):  # noqa: F811
    args = ("generate", model, "--plan", adapted[0], "--prompt", "It was a dark", "--max-new-tokens", 3, "--device", "cpu")
    with without_inductor():
        result = call(*args, *(["--quiet"] if quiet else []))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("It was a dark") and len(lines[0]) > len("It was a dark")
    assert (len(lines) == 1) if quiet else any(line.startswith("next: rana-fx compare") for line in lines)
    assert quiet or any(line.split() == ["compiled", "by", "rana,", "static", "cache"] for line in lines)


def test_text_is_shown_while_it_is_made(model, capsys):  # noqa: F811
    network, tokenizer = load_model(str(model), device="cpu")
    live, parts = _Live("It was"), []
    made = generate(network, tokenizer, "It was", max_new_tokens=6, live=lambda part: parts.append(part) or live.part(part))
    live.end()
    assert len(parts) > 2 and "".join(parts) == made.text
    assert capsys.readouterr().out == f"It was{made.text}\n" and len(made.steps_ms) == made.tokens - 1


def test_a_word_that_was_not_printed_is_not_lost(capsys):
    _Live("prompt").end()
    assert capsys.readouterr().out == "prompt\n"


def test_every_command_is_quiet_if_asked():
    for command in ("demo", "adapt", "sweep", "compare", "eval", "finetune", "explain", "generate", "tasks", "env"):
        assert "--quiet" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output, command
