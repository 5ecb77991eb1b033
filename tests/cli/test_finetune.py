"""``rana-fx finetune``: the written plan has a lower loss and evaluates the same in another process; messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import rana_fx
from rana_fx._backend import rewrite
from rana_fx.cli import app
from rana_fx.commands.finetune import _shuffled
from rana_fx.commands.memory import memory_hints
from rana_fx.errors import OutOfMemory
from rana_fx.evaluation.perplexity import load_model
from rana_fx.training import loop

DATA = Path(rana_fx.__file__).parent / "data"
TEXT = DATA / "calib.jsonl.xz"
SIZES = ("--context", 64, "--batch-size", 4, "--device", "cpu")
HEAD = ("--tokens", 256 * 8, "--held-out", 256 * 2, "--seed", 3)


def call(*args: object) -> Result:
    torch._dynamo.reset()
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The embedded model's first layer, and a plan of it."""
    folder = tmp_path_factory.mktemp("finetune")
    model, tokenizer = load_model(str(DATA / "tiny-llama-prose-5m"), device="cpu")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    result = call(
        "adapt",
        folder / "model",
        "--data",
        TEXT,
        "--out",
        folder / "plan",
        "--budget",
        0.5,
        "--recipe",
        "paper",
        "--tokens",
        2000,
        *SIZES,
    )
    assert result.exit_code == 0, result.output
    return folder / "model", folder / "plan"


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewritten training graphs run eagerly: compiling one takes a minute, and
    tests/training/test_gradients.py does."""

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        rewrite(gm, example_inputs)
        return gm.forward

    monkeypatch.setattr(loop, "backend", backend)


def finetune(adapted: tuple[Path, Path], out: Path, *args: object) -> tuple[dict[str, Any], Result]:
    record = out.parent / f"{out.name}.json"
    head = ("finetune", adapted[0], "--plan", adapted[1], "--data", TEXT, "--out", out, "--json", record)
    result = call(*head, *HEAD, *SIZES, *args)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(record.read_text()), result


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_it_writes_is_better_and_evaluates_the_same(method: str, adapted: tuple[Path, Path], tmp_path: Path) -> None:
    extra = ("--lr", 1e-3, "--distill", 0.3)
    if method == "lora":
        extra = ("--lr", "auto", "--rank", 8, "--thresholds", "--gradient-checkpointing")
    facts, result = finetune(adapted, tmp_path / "out", "--method", method, *extra)
    loss = facts["loss"]
    assert loss["after"] < loss["before"]
    assert facts["steps"] == 8 and facts["tokens"] == 2048 and facts["held_out_tokens"] == 8 * 63
    assert facts["evaluations"][0] == [0, pytest.approx(loss["before"], rel=1e-4)]
    if method == "lora":
        assert set(facts["rates"]) == {"3e-05", "0.0001", "0.0003", "0.001"}
        assert facts["rates"][f"{facts['rate']:g}"] == min(facts["rates"].values())
        assert abs(facts["budget"]["measured"]["flops"] - 0.5) < 0.02
    else:
        assert facts["evaluations"][-1] == [8, pytest.approx(loss["after"], rel=1e-4)]
    assert f"{loss['after']:.4f}" in result.output
    plan = rana_fx.load_plan(tmp_path / "out" / "plan")
    assert plan.digest() == facts["digest"] != facts["trained_from"] == rana_fx.load_plan(adapted[1]).digest()
    # the folders alone, read by another command, on any text, give what the model in memory gave
    model, _ = load_model(str(tmp_path / "out" / "model"), device="cpu")
    rana_fx.attach(model, plan)
    assert not any(
        name.startswith("rana_fx") for name in load_model(str(tmp_path / "out" / "model"), device="cpu")[0].state_dict()
    )
    evaluated = call(
        "eval", tmp_path / "out" / "model", "--plan", tmp_path / "out" / "plan", "--data", TEXT, "--tokens", 512, *SIZES
    )
    assert evaluated.exit_code == 0, evaluated.output


def test_sequences_are_shuffled_and_none_is_lost() -> None:
    batches = [{"input_ids": torch.arange(8 * i, 8 * i + 8).view(4, 2), "attention_mask": torch.ones(4, 2)} for i in range(3)]
    got = _shuffled(batches, seed=1)
    assert [batch["input_ids"].shape for batch in got] == [(4, 2)] * 3 and set(got[0]) == set(batches[0])
    rows = torch.cat([batch["input_ids"] for batch in got])
    assert sorted(rows.tolist()) == torch.arange(24).view(12, 2).tolist() != rows.tolist()
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(got, _shuffled(batches, seed=1), strict=True))


def test_resuming_gives_the_same_plan(adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--method", "factors", "--lr", 1e-3, "--checkpoint-every", 3)
    whole, _ = finetune(adapted, tmp_path / "a", *args)
    write = loop.checkpoint.write

    def killed(folder: Path, state: dict[str, Any]) -> None:
        write(folder, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "write", killed)
        broken = call("finetune", adapted[0], "--plan", adapted[1], "--data", TEXT, "--out", tmp_path / "b", *HEAD, *SIZES, *args)
    assert broken.exit_code == 130 and not (tmp_path / "b" / "plan").exists()
    assert "interrupted: --resume continues from the checkpoint in" in broken.output
    facts, _ = finetune(adapted, tmp_path / "b", *args, "--resume", "--lr", "auto")
    assert facts["loss"]["after"] < facts["loss"]["before"]
    assert facts["losses"] == whole["losses"] and facts["digest"] == whole["digest"] and facts["rate"] == 1e-3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tokens", 10**9), r"got \d+ tokens, expected 1000000512 \(1000000000 to train on and 512 held out\)"),
        (("--tokens", 10), r"option --tokens=10 is not valid: expected at least 256, one step of 1 x 4 x 64"),
        (("--lr", "fast"), r"option --lr='fast' is not valid: expected a positive number or auto"),
        (("--method", "qlora"), r"method='qlora' is not known. Pick one of: lora, full, factors"),
        (("--target", "q_proj"), r"LoRA target 'q_proj' matches no matrix"),
        (("--resume",), r"cannot be resumed from: there is no such file"),
    ],
)
def test_mistakes_end_with_one_message(
    args: tuple[object, ...], message: str, adapted: tuple[Path, Path], tmp_path: Path
) -> None:
    head = ("finetune", adapted[0], "--plan", adapted[1], "--data", TEXT, "--out", tmp_path / "out")
    result = call(*head, *HEAD, *SIZES, *args)
    assert result.exit_code == 2, result.output
    assert re.search(message, " ".join(result.output.split())), result.output


def test_a_plan_for_another_model_is_refused(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer = load_model(str(adapted[0]), device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    args = ("--plan", adapted[1], "--data", TEXT, "--out", tmp_path / "out")
    result = call("finetune", tmp_path / "other", *args, *HEAD, *SIZES)
    assert result.exit_code == 2 and "does not fit" in result.output and "up_proj" in result.output


def test_too_little_memory_says_what_to_lower(
    adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 79 GiB.")

    monkeypatch.setattr(loop, "_accumulate", full)
    head = ("finetune", adapted[0], "--plan", adapted[1], "--data", TEXT, "--out", tmp_path / "out", "--lr", 1e-3)
    result = call(*head, *HEAD, *SIZES)
    text = " ".join(result.output.split())
    assert result.exit_code == 2 and "error: out of memory on cpu: CUDA out of memory. Tried to allocate 2.00 GiB. Exp" in text
    assert text.endswith(
        "batches of 4 x 64 tokens to fit while training: lower --batch-size (and raise --accumulate, for as many tokens a step), "
        "or pass --gradient-checkpointing."
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 1, "checkpointing": True}, r"of 1 x 64 tokens to fit while training: lower --context\.$"),
        ({"method": "full", "distill": 0.5}, r"use --method lora, or omit --distill, whose teacher is a copy of the model\.$"),
    ],
)
def test_too_little_memory_says_no_more_than_helps(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "context": 64, "method": "lora", "distill": 0.0, "checkpointing": False}
    with pytest.raises(OutOfMemory, match=message), memory_hints(device="cuda:0", out=tmp_path, **settings | given):
        raise torch.OutOfMemoryError("CUDA out of memory.")
