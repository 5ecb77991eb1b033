"""The public interface besides plans: names and their arguments, command-line options, keys of JSON files."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from typer.testing import CliRunner

import rana_fx
import rana_fx.training
from rana_fx._backend import rewritten
from rana_fx.cli import app
from tests.support.tiny_model import CHOICE

DATA = Path(str(resources.files("rana_fx"))) / "data"
EMBEDDED = DATA / "tiny-llama-prose-5m"


def public() -> dict[str, dict[str, str | None]]:
    """By module, each public name and the names of its arguments (None: it takes none that we name)."""
    return {
        module.__name__: {
            name: _arguments(getattr(module, name)) for name in (*module.__all__, "__version__") if hasattr(module, name)
        }
        for module in (rana_fx, rana_fx.training)
    }


def choices() -> dict[str, str]:
    """Names of recipes and metrics, as the message about an unknown one lists them."""
    found = {}
    for kind in ("recipe", "metric"):
        try:
            rana_fx.adapt(torch.nn.Linear(1, 1), [], **{kind: "unknown"})
        except rana_fx.RanaError as error:
            found[kind] = str(error.facts["valid"])
    return found


def _arguments(found: Any) -> str | None:
    if not callable(found) or (isinstance(found, type) and issubclass(found, BaseException)):
        return None
    return " ".join(inspect.signature(found).parameters)


def options() -> dict[str, dict[str, Any]]:
    """By command, the default of each option by all of its spellings, and of each argument."""
    commands: Any = typer.main.get_command(app)
    found: dict[str, dict[str, Any]] = {"": _options(commands)}
    return found | {name: _options(command) for name, command in commands.commands.items()}


def _options(command: Any) -> dict[str, Any]:
    spelled = {name: parameter.default for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    # libraries represent a missing default in different ways
    return {name: value if isinstance(value, str | int | float) else None for name, value in spelled.items()}


def keys(facts: dict[str, Any]) -> dict[str, str]:
    """Types of each value inside a JSON object, by path: {"sites[].error": "NoneType float"}."""
    found: dict[str, set[str]] = {}

    def visit(value: Any, path: str) -> None:
        found.setdefault(path, set()).add(type(value).__name__)
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(inner, f"{path}.{key}".lstrip("."))
        if isinstance(value, list):
            for inner in value:
                visit(inner, f"{path}[]")

    visit(facts, "")
    return {key: " ".join(sorted(types)) for key, types in sorted(found.items())}


@contextlib.contextmanager
def shallow() -> Iterator[None]:
    """Load only the first layer of models, for the demo with its embedded model."""
    load = transformers.AutoModelForCausalLM.from_pretrained

    def first(*args: Any, **given: Any) -> Any:
        model: Any = load(*args, **given)
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
        return model

    transformers.AutoModelForCausalLM.from_pretrained = first
    try:
        yield
    finally:
        transformers.AutoModelForCausalLM.from_pretrained = load


@contextlib.contextmanager
def without_inductor() -> Iterator[None]:
    """Rewritten graphs run eagerly, without compile time: JSON keys do not depend on Inductor."""
    compile_ = torch.compile

    @functools.wraps(compile_)
    def instead(model: Any = None, **given: Any) -> Any:
        backend = {"inductor": "eager", rana_fx.backend: rewritten}.get(given["backend"], given["backend"])
        return compile_(
            model, **{key: value for key, value in given.items() if key not in ("options", "mode")} | {"backend": backend}
        )

    torch.compile = instead  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_
        torch._dynamo.reset()


def call(folder: Path, *words: object) -> dict[str, Any]:
    """The JSON file of a command."""
    torch._dynamo.reset()
    out = folder / f"{words[0]}.json"
    result = CliRunner().invoke(app, [*map(str, words), "--device", "cpu", "--json", str(out)])
    assert result.exit_code == 0, (result.output, result.exception)
    return dict(json.loads(out.read_text()))


def prepare(folder: Path) -> None:
    """A model of one block with the embedded tokenizer, one task."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((EMBEDDED / name).read_bytes())
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"start": f"The man saw {n}", "ends": ["a dog", "the old house"], "label": n % 2} for n in range(3)]
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tasks / "choice.yaml").write_text(CHOICE.format(data=tasks / "rows.jsonl"))


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    """Arguments in a folder that ``prepare`` filled, in order of the calls; a word after a command names one of two calls."""
    model, text, plan = folder / "model", ("--data", DATA / "calib.jsonl.xz", "--context", 32, "--batch-size", 4), folder / "plan"
    task = ("--tasks", "local_choice", "--include", folder / "tasks")
    return {
        "adapt": (model, *text, "--out", plan, "--budget", 0.6, "--recipe", "paper", "--tokens", 512),
        "eval": (model, *text, "--tokens", 256, "--plan", plan),
        "eval, dense": (model, *text, "--tokens", 256),
        "explain": (model, "--plan", plan),
        "explain, dense": (model,),
        "finetune": (model, *text, "--plan", plan, "--out", folder / "out", "--tokens", 1024, "--held-out", 128, "--rank", 2),
        "generate": (model, "--plan", plan, "--prompt", "It was a dark", "--max-new-tokens", 4),
        "generate, dense": (model, "--prompt", "It was a dark", "--max-new-tokens", 4),
        "tasks": (model, "--plan", plan, *task, "--no-compile"),
        "tasks, dense": (model, *task),
        "demo": ("--recipe", "teal", "--tokens", 128, "--context", 32, "--max-new-tokens", 2),
    }


def record(folder: Path, name: str) -> dict[str, str]:
    """Keys of the JSON file of one of ``commands``."""
    with without_inductor(), shallow():
        return keys(call(folder, name.partition(",")[0], *commands(folder)[name]))


def write(path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        found = {
            "public": public(),
            "choices": choices(),
            "options": options(),
            "json": {name: record(folder, name) for name in commands(folder)},
        }
    path.write_text(json.dumps(found, indent=1) + "\n")
