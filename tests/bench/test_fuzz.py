"""bench.fuzz: right examples are right, and a planted defect, a dropped plan and an error are faults of their kinds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench.fuzz import __main__ as command
from bench.fuzz.spec import Spec
from bench.fuzz.trial import attempt
from rana_fx import apply
from rana_fx.kernels import reference
from rana_fx.passes import runner

CPU = torch.device("cpu")
PLAIN = Spec(
    seed=3, width=16, heads=2, ffn=24, layers=1, attention="separate", mlp="gated", activation="silu", norm="layer",
    form="linear", bias=True, parallel=False, tied=False, shared=False, dropout="none", cast="none", write="none",
    branch="none", cache="none", dtype="float32", plan="drawn", kinds=("rank", "neuron", "gated"), router_bits=16, bits=8,
    density=0.7, shift=True, budget=0.7, prefill="masked", dynamic=False, gradients=False, strict=True, as_option=False,
    calls=((2, 5), (1, 1)),
)  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        PLAIN,
        replace(PLAIN, form="tensordot", write="out", cache="growing", kinds=("hybrid", "exact", "own")),
        # graphs of one layer, with views of Parameters, while weights of the same shapes are in others
        replace(PLAIN, layers=2, form="matmul", branch="break_in_mlp"),
        replace(PLAIN, plan="cats", mlp="packed", dropout="training", gradients=True, budget=0.9),
        # without norms, whose adapted model has 20 times the rounding error of the dense one
        replace(
            PLAIN,
            seed=44552,
            width=12,
            layers=2,
            attention="shared_keys",
            mlp="packed",
            norm="none",
            bias=False,
            plan="static",
            bits=16,
            budget=0.9,
            gradients=True,
            as_option=True,
            calls=((2, 2),),
        ),
    ],
)
def test_an_example_is_right(spec):
    outcome = attempt(spec, CPU, lowered=False)
    assert outcome.kind == "right", outcome


def test_a_wrong_mask_is_wrong(monkeypatch):
    monkeypatch.setattr(reference, "kept", lambda v, tau: torch.ones_like(v, dtype=torch.bool))
    monkeypatch.setattr(apply, "kept", reference.kept)
    assert attempt(replace(PLAIN, kinds=("rank", "own", "stored"), bits=4, router_bits=4), CPU, lowered=False).kind == "wrong"


def test_a_plan_that_is_dropped_in_silence_is_dense(monkeypatch):
    monkeypatch.setattr(runner, "PRE_GRAD", ())
    assert attempt(PLAIN, CPU, lowered=False).kind == "dense"


def test_an_unknown_error_is_a_crash(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(runner, "match_plan", broken)
    outcome = attempt(PLAIN, CPU, lowered=False)
    assert outcome.kind == "crash" and "planted" in outcome.detail


def test_counts_are_written_and_faults_have_an_example(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "PRE_GRAD", ())
    out = tmp_path / "rows.jsonl"
    with pytest.raises(command.typer.Exit) as stopped:
        command.main(examples=3, device="cpu", lowered=0, workers=1, seconds=600.0, seed=3, replay=None, out=out)
    assert stopped.value.exit_code == 1
    first, *faults = map(json.loads, out.read_text().splitlines())
    assert first["examples"] == sum(first["kinds"].values()) == 3
    assert faults and all(fault["kind"] in ("wrong", "dense", "crash") for fault in faults)
    command.main(replay=json.dumps(faults[0]["spec"]), device="cpu")
    assert "as rewritten Outcome(kind=" in capsys.readouterr().out


def test_what_pytorch_does_not_compile_is_unsupported():
    """The branches of torch.cond return one layout of different strides, which PyTorch refuses with any backend."""
    spec = replace(
        PLAIN, width=40, heads=4, attention="none", mlp="packed", norm="rms", form="einsum", cast="gate", branch="cond",
        shared=True, plan="teal", as_option=True, calls=((1, 5),),
    )  # fmt: skip
    outcome = attempt(spec, CPU, lowered=False)
    assert outcome.kind == "unsupported" and "cond" in outcome.detail, outcome


def test_drawing_stops_at_its_time_and_writes_its_counts(tmp_path):
    saved = tmp_path / "counts.json"
    seen = command.draw(10**9, "cpu", 0, seconds=1.0, seed=0, saved=saved)
    assert seen["kinds"]["right"] > 0
    assert json.loads(saved.read_text()) == seen


def test_a_worker_that_hangs_is_killed_and_no_fault(monkeypatch):
    monkeypatch.setattr(command, "GRACE", 0.0)
    seen = command._spread(2, 10**9, "cpu", 0, seconds=0.0, seed=0)
    assert not seen["kinds"] and not seen["faults"]
