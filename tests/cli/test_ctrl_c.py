"""Ctrl-C in every command, at the stage that takes long and while the result is written: exit code 130, one line, no traceback,
and only whole files."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rana_fx
from rana_fx import _interrupts
from rana_fx.cli import app
from tests.cli.test_adapt_targets import tiny  # noqa: F401 - a fixture
from tests.cli.test_odd_arguments import heed_ctrl_c
from tests.golden.interface import without_inductor

SIZES = ("--context", 32, "--batch-size", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def plan(tiny, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("plan") / "plan"
    words = ("adapt", tiny[0], "--data", tiny[1], "--out", out, "--recipe", "teal", "--tokens", 256, *SIZES)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return out


def stop(*_, **__):
    """What the handler of the signal does."""
    _interrupts._raise(signal.SIGINT, None)


def arguments(tiny, plan, folder):  # noqa: F811
    model, text = tiny
    data, saved = ("--data", text, "--tokens", 512, *SIZES), ("--plan", plan)
    return {
        "adapt": (model, *data, "--recipe", "teal", "--out", folder / "plan"),
        "sweep": (model, *data, "--recipe", "teal", "--out", folder / "plans", "--budgets", "0.8,0.6,0.4"),
        "compare": (model, *saved, *data, "--new-tokens", 2),
        "eval": (model, *saved, *data),
        "explain": (model, *saved, "--device", "cpu"),
        "generate": (model, *saved, "--prompt", "The sea", "--max-new-tokens", 4, "--device", "cpu"),
        "finetune": (
            model, *saved, "--data", text, *SIZES, "--tokens", 512, "--held-out", 128, "--out", folder / "tuned", "--lr", 1e-3,
            "--checkpoint-every", 2,
        ),
        "tasks": (model, *saved, "--tasks", "local", "--no-compile", "--device", "cpu"),
        "demo": ("--tokens", 128, "--context", 32, "--device", "cpu"),
    }  # fmt: skip


# command, what is running when the signal comes, files that are there afterwards
STAGES = [
    ("adapt", "rana_fx.adaptation.solved", set()),
    ("adapt", "rana_fx.plan_io.write_bytes", set()),
    ("sweep", "rana_fx.adaptation.solved", set()),
    ("sweep", "rana_fx.commands.sweep.sweep_plot.plot", {"plans/0.8", "plans/0.6", "plans/0.4"}),
    ("compare", "rana_fx.evaluation.compare.compare", set()),
    ("eval", "rana_fx.evaluation.perplexity.evaluate_adapted", set()),
    ("explain", "rana_fx.report.explain", set()),
    ("generate", "rana_fx.evaluation.generate._Clock.put", set()),
    ("finetune", "rana_fx.training.loop._accumulate", set()),
    ("finetune", "rana_fx.training.saved_pair.switching", set()),
    ("tasks", "rana_fx.integrations.lm_eval_harness.run_tasks", set()),
    ("demo", "rana_fx.commands.demo_run.evaluate", set()),
    *((command, "rana_fx.atomic.os.fsync", None) for command in ("adapt", "eval", "explain", "generate")),
]


@pytest.mark.parametrize(("command", "stage", "whole"), STAGES, ids=[f"{row[0]}-{row[1].rpartition('.')[2]}" for row in STAGES])
def test_interrupted(command, stage, whole, tiny, plan, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip({"finetune": "peft", "tasks": "lm_eval", "sweep": "matplotlib"}.get(command, "torch"))
    monkeypatch.setattr(_interrupts, "_seen", [])
    monkeypatch.setattr(stage, stop)
    # a library imported in an earlier runner logs to the stream of that one, which is closed, and logging would say so here
    monkeypatch.setattr(logging, "raiseExceptions", False)
    words = (command, *arguments(tiny, plan, tmp_path)[command], "--json", tmp_path / "facts.json")
    with without_inductor():
        result = CliRunner().invoke(app, [str(word) for word in words])
    assert _interrupts._seen, (result.output, result.exception)
    assert result.exit_code == 130 and "Traceback" not in result.output, (result.output, result.exception)
    assert result.stderr.splitlines()[-1].startswith("interrupted")
    assert not (tmp_path / "facts.json").exists()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    if command != "finetune":  # whose checkpoints are whole files, made to go on from
        assert {str(path.parent.relative_to(tmp_path)) for path in left} == (whole or set()), left
    assert not [path for path in left if path.suffix == ".tmp"]
    for folder in whole or ():
        assert rana_fx.load_plan(tmp_path / folder).recipe == "teal"


def test_a_signal_to_the_whole_group_as_a_terminal_sends_it(tiny, tmp_path):  # noqa: F811
    """After calibration, with all threads and workers that it started."""
    (tmp_path / "rana-fx").write_text(
        "import sys, time\n"
        "from rana_fx import adaptation\n"
        "from rana_fx.cli import app\n"
        "def solved(*_):\n"
        f"    open({str(tmp_path / 'begun')!r}, 'w').close()\n"
        "    time.sleep(60)\n"
        "adaptation.solved = solved\n"
        "sys.exit(app())\n"
    )
    model, text = tiny
    words = ("adapt", model, "--data", text, "--recipe", "teal", "--out", tmp_path / "plan", "--tokens", 256, *SIZES)
    running = subprocess.Popen(
        [sys.executable, *map(str, (tmp_path / "rana-fx", *words))], stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(rana_fx.__file__).parents[1])}, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    while not (tmp_path / "begun").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    printed = running.communicate()[1]
    assert running.returncode == 130 and "Traceback" not in printed and printed.endswith("interrupted.\n"), printed
    assert not (tmp_path / "plan").exists()
