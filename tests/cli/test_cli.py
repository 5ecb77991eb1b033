"""The command line, from adapting the first layer of the embedded model to generating with it: JSON files, messages,
exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import rana_fx
from rana_fx.cli import app
from rana_fx.commands.record import cell, write_json
from rana_fx.errors import InvalidOption, RanaError
from rana_fx.evaluation.perplexity import load_model

DATA = Path(rana_fx.__file__).parent / "data"
MODEL = str(DATA / "tiny-llama-prose-5m")
TEXT = str(DATA / "calib.jsonl.xz")
HELD_OUT = str(DATA / "eval.jsonl.xz")


def call(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def facts(path: Path, result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert found["versions"]["rana_fx"] == rana_fx.__version__ and "torch" in found["versions"]
    assert found["command_line"].startswith("rana-fx") and "seed" in found
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's first layer, which is traced and compiled quickly."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = load_model(MODEL, device="cpu")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """(folder of a plan, JSON facts of the command that made it, its output)."""
    folder = tmp_path_factory.mktemp("cli")
    out, record = folder / "plan", folder / "adapt.json"
    result = call(
        "adapt", model, "--data", TEXT, "--out", out, "--budget", 0.6, "--recipe", "teal",
        "--tokens", 3000, "--context", 128, "--seed", 7, "--device", "cpu", "--json", record,
    )  # fmt: skip
    return out, facts(record, result), result.output


def test_adapt_writes_a_plan_and_its_facts(adapted: tuple[Path, dict[str, Any], str]) -> None:
    out, found, printed = adapted
    plan = rana_fx.load_plan(out)
    assert (plan.recipe, plan.budget, plan.seed, plan.tokens) == ("teal", 0.6, 7, 3000)
    assert found["digest"] == plan.digest() and found["seed"] == 7
    assert found["budget"]["asked"] == 0.6 and found["budget"]["metric"] == "flops"
    assert found["budget"]["expected"] == {"flops": plan.expected_budget("flops"), "bytes": plan.expected_budget("bytes")}
    assert found["plan"] == json.loads(json.dumps(plan.to_dict()))
    assert found["options"]["context"] == 128
    assert plan.digest()[:12] in printed and cell(plan.expected_budget("bytes")) in printed
    assert "by role and layers" in printed and "next: rana-fx eval" in printed
    assert not any(adapter.name in printed.replace(str(out), "") for adapter in plan.adapters)


def test_a_budget_of_all_linears(model: Path, tmp_path: Path) -> None:
    record = tmp_path / "facts.json"
    text = ("--tokens", 600, "--context", 128, "--device", "cpu", "--json", record)
    result = call(
        "adapt", model, "--data", TEXT, "--out", tmp_path / "plan", "--budget", 0.6, "--recipe", "teal", "--scope", "all", *text
    )
    found = facts(record, result)
    assert found["budget"]["scope"] == "all" and "output head included" in " ".join(result.output.split())
    plan = rana_fx.load_plan(tmp_path / "plan")
    assert {site.role for site in plan.sites if site.counted and plan.adapter_of(site.name)} >= {"head", "up", "down"}
    measured = facts(record, call("eval", model, "--plan", tmp_path / "plan", "--data", HELD_OUT, *text))["budget"]
    assert measured["scope"] == "all" and abs(measured["measured"]["flops"] - 0.6) < 0.08


def test_eval_shows_dense_and_adapted(model: Path, adapted: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    plan = rana_fx.load_plan(adapted[0])
    args = (
        "eval",
        model,
        "--data",
        HELD_OUT,
        "--tokens",
        1500,
        "--context",
        128,
        "--device",
        "cpu",
        "--json",
        tmp_path / "e.json",
    )
    result = call(*args, "--plan", adapted[0], "--layers")
    found = facts(tmp_path / "e.json", result)
    # 1500 tokens in 12 sequences: the first of each is predicted from nothing
    assert found["tokens"] == found["dense"]["tokens"] == found["adapted"]["tokens"] == 1500 - 12
    assert 5 < found["dense"]["perplexity"] < found["adapted"]["perplexity"] < 4096
    assert found["budget"]["asked"] == 0.6
    assert abs(found["budget"]["measured"]["flops"] - 0.6) < 0.05
    assert [row["site"] for row in found["sites"]] == [site for adapter in plan.adapters for site in adapter.sites]
    assert all(0 < row["density_measured"] <= 1 for row in found["sites"])
    shown = [*found["dense"].values(), *found["adapted"].values(), *found["budget"]["measured"].values()]
    shown += [row["density_measured"] for row in found["sites"]]
    assert all(cell(value) in result.output for value in shown)
    # the same text without a plan: the dense model alone, with the same numbers
    alone = facts(tmp_path / "e.json", call(*args))
    assert alone["dense"] == found["dense"] and alone["adapted"] is None and alone["budget"] is None


def test_explain_lists_every_linear(model: Path, adapted: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    plain = facts(tmp_path / "a.json", call("explain", model, "--device", "cpu", "--json", tmp_path / "a.json"))["report"]
    result = call("explain", model, "--plan", adapted[0], "--device", "cpu", "--json", tmp_path / "b.json")
    report = facts(tmp_path / "b.json", result)["report"]
    # q, k, v, o, gate, up, down, and the head
    assert plain["sites"] == report["sites"] == 8
    assert plain["plan"] is None and report["plan"] == adapted[1]["digest"][:12]
    assert {row["action"] for row in plain["rows"]} <= {"dense", "skipped"}
    assert sum(row["action"] == "neuron" for row in report["rows"]) == sum(
        len(a["sites"]) for a in adapted[1]["plan"]["adapters"]
    )
    assert not all(row["site"] in result.output for row in report["rows"])
    every = call("explain", model, "--plan", adapted[0], "--device", "cpu", "--layers")
    assert all(row["site"] in every.output and row["detail"] in every.output for row in report["rows"])


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generate_continues_the_prompt(
    model: Path, adapted: tuple[Path, dict[str, Any], str], tmp_path: Path, cache: str, request: pytest.FixtureRequest
) -> None:
    if cache == "dynamic":  # through Inductor: tests/integration/test_backend.py
        request.getfixturevalue("graphs_as_rewritten")
    args = ("generate", model, "--plan", adapted[0], "--prompt", "It was a dark", "--max-new-tokens", 3, "--cache", cache)
    result = call(*args, "--device", "cpu", "--json", tmp_path / "g.json")
    found = facts(tmp_path / "g.json", result)
    assert found["backend"] == "rana" and found["cache"] == cache and found["digest"] == adapted[1]["digest"]
    assert found["threads"] == torch.get_num_threads()
    assert ["threads", str(found["threads"])] in [line.split() for line in result.output.splitlines()]
    assert 1 <= found["tokens"] <= 3 and found["text"]
    assert "It was a dark" + found["text"] in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("adapt", MODEL, "--data", TEXT, "--out", "p", "--budget", "1.5"), "budget=1.5 is outside (0, 1]"),
        (("adapt", MODEL, "--data", TEXT, "--out", "p", "--recipe", "soup"), "recipe='soup' is not known. Pick one of: "),
        (
            ("adapt", MODEL, "--data", TEXT, "--out", "p", "--scope", "heads"),
            "scope='heads' is not known. Pick one of: blocks, all",
        ),
        (
            ("adapt", MODEL, "--data", TEXT, "--out", "p", "--metric", "joules"),
            "metric='joules' is not known. Pick one of: flops, bytes",
        ),
        (("adapt", MODEL, "--data", TEXT, "--out", "p", "--column", "body"), "no text column 'body'; it has 'source', 'text'"),
        (
            ("adapt", MODEL, "--data", TEXT, "--out", "p", "--context", "4096"),
            "option --context=4096 is not valid: expected at most 1024",
        ),
        (
            ("adapt", MODEL, "--data", "no/such.jsonl", "--out", "p"),
            "no/such.jsonl cannot be read as a dataset: there is no such file",
        ),
        (("eval", "/no/such/model", "--data", TEXT), "/no/such/model cannot be loaded as a model"),
        (("eval", MODEL, "--data", TEXT, "--plan", MODEL), "is not a readable plan: there is no plan.json in it"),
        (("explain", MODEL, "--dtype", "int3"), "option dtype='int3' is not valid: expected one of auto, float32"),
        (
            ("generate", MODEL, "--prompt", "a", "--cache", "lru"),
            "option cache='lru' is not valid: expected one of static, dynamic",
        ),
        (("generate", MODEL, "--prompt", "a", "--max-new-tokens", "2000"), "the model's context is 1024"),
    ],
)
def test_mistakes_end_with_one_message(
    args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # few tokens, in case an error is found late
    result = call(
        *args, *(("--tokens", 200) if args[0] in ("adapt", "eval") and "--context" not in args else ()), "--device", "cpu"
    )
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_debugging_shows_the_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANA_FX_DEBUG", "1")
    assert isinstance(call("explain", MODEL, "--dtype", "int3").exception, InvalidOption)


def test_an_error_inside_a_compiler_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from rana_fx.evaluation import perplexity as evaluate

    class Wrapped(Exception):
        inner_exception = RanaError(reason="the real reason")

    def fail(*_: object, **__: object) -> None:
        raise Wrapped("long story")

    monkeypatch.setattr(evaluate, "load_model", fail)
    result = call("explain", MODEL)
    assert result.exit_code == 2 and result.stderr == "error: the real reason\n"


def test_help_and_version() -> None:
    shown = call("--help")
    assert shown.exit_code == 0
    assert all(name in shown.output for name in ("demo", "adapt", "eval", "explain", "generate"))
    assert call("--version").output == f"rana-fx {rana_fx.__version__}\n"
    assert call("adapt", "--nonsense").exit_code == 2


def heed_ctrl_c() -> None:
    """In a process before it starts: one that a shell runs in the background, and so its children, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_imports_leave_signals_alone_and_do_not_wait_for_transformers() -> None:
    slow = ("transformers", "datasets", "torch._inductor.compile_fx")
    code = (
        "import signal, sys, rana_fx\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
        f"import rana_fx.cli\nprint([name for name in {slow} if name in sys.modules])"
    )
    root = str(Path(rana_fx.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
        preexec_fn=heed_ctrl_c,
    )
    assert done.stdout == "True\n[]\n"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "facts.json"
    write_json(path, {"a": 1.5, "b": float("inf")})
    assert json.loads(path.read_text()) == {"a": 1.5, "b": "inf"}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 1.5 and [file.name for file in path.parent.iterdir()] == ["facts.json"]
    with pytest.raises(InvalidOption, match="a file that can be written"):
        write_json(path / "below-a-file.json", {})
