"""Arguments are checked before anything is loaded, and what was meant is named; --dtype auto follows the plan; --config FILE."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import rana_fx
from rana_fx import choices
from rana_fx.cli import app
from rana_fx.commands import checks, config_file
from rana_fx.commands.loading import dtype_for
from rana_fx.errors import InvalidOption, UnknownChoice, nearest, one_of
from rana_fx.evaluation.perplexity import load_model
from rana_fx.recipes import RECIPES, takes_budget
from tests.cli.test_cli import HELD_OUT, MODEL, TEXT, adapted, call, model  # noqa: F401 - fixtures

YAML = """
model: m
budget: 0.3
max_new_tokens: 4
run: {max-new-tokens: 5, target: [a, b], thresholds: true}
other: {nonsense: 1}
"""
TOML = """
model = "m"
budget = 0.3
max-new-tokens = 4
[run]
max_new_tokens = 5
target = ["a", "b"]
thresholds = true
"""
PLAN = Path(__file__).parents[1] / "golden" / "plans" / "rank"
ADAPT = ("adapt", MODEL, "--data", TEXT, "--out", "plan")


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("rana_fx.evaluation.perplexity.load_model", refuse)
    monkeypatch.setattr("rana_fx.plan.load_plan", refuse)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((*ADAPT, "--budget", "58"), "budget=58.0 is outside (0, 1]"),
        ((*ADAPT, "--budget", "58"), "Did you mean 0.58?"),
        ((*ADAPT, "--budgets", "0.5,58"), "Did you mean 0.58?"),
        ((*ADAPT, "--budgets", "0.5,0.5"), "expected a list of different budgets"),
        ((*ADAPT, "--budgets", "0.5;0.7"), "expected numbers with commas, such as 0.3,0.5,0.7"),
        ((*ADAPT, "--max-kl", "0"), "max_kl=0.0 is not a positive number"),
        ((*ADAPT, "--max-kl", "0.1", "--budget", "0.58"), "got budget=0.58, max_kl=0.1 together"),
        ((*ADAPT, "--budget", "0.58", "--budgets", "0.3,0.5"), "expected at most one of budget"),
        ((*ADAPT, "--recipe", "rnaa"), "Did you mean 'rana'?"),
        ((*ADAPT, "--metric", "byte"), "Did you mean 'bytes'?"),
        ((*ADAPT, "--scope", "block"), "Did you mean 'blocks'?"),
        ((*ADAPT, "--dtype", "bfloat"), "expected one of auto, float32, bfloat16, float16 (did you mean bfloat16?)"),
        (("adapt", f"{MODEL}x", "--data", TEXT, "--out", "p"), f"there is no such folder (did you mean {MODEL}?)"),
        (("adapt", str(Path(MODEL).parent), "--data", TEXT, "--out", "p"), f"has no config.json (did you mean {MODEL}?)"),
        (("adapt", TEXT, "--data", TEXT, "--out", "p"), "it is a file, not a folder"),
        (("adapt", MODEL, "--data", TEXT.replace("calib", "clib"), "--out", "p"), f"(did you mean {TEXT}?)"),
        (("adapt", MODEL, "--data", str(Path(MODEL) / "config.md"), "--out", "p"), "there is no such file or folder"),
        (("eval", MODEL, "--data", TEXT, "--plan", f"{PLAN}k"), f"there is no such folder (did you mean {PLAN}?)"),
        (("eval", MODEL, "--data", TEXT, "--plan", str(PLAN / "plan.json")), "it is a file, not a folder"),
        (("compare", MODEL, "--data", TEXT, "--plan", f"{PLAN}k"), f"there is no such folder (did you mean {PLAN}?)"),
        (("compare", MODEL, "--data", TEXT.replace("calib", "clib"), "--plan", str(PLAN)), f"(did you mean {TEXT}?)"),
        (("sweep", f"{MODEL}x", "--data", TEXT), f"there is no such folder (did you mean {MODEL}?)"),
        (("sweep", MODEL, "--data", TEXT, "--budgets", "80,70"), "budget=80.0 is outside (0, 1]"),
        (("sweep", MODEL, "--data", TEXT, "--recipe", "exact"), "option --recipe='exact' is not valid: expected a recipe"),
        ((*ADAPT, "--recipe", "exact", "--max-kl", "0.1"), "option --recipe='exact' is not valid: expected a recipe"),
        (("sweep", MODEL, "--data", TEXT, "--budgets", "0.8;0.5"), "expected numbers with commas"),
        (("sweep", MODEL, "--data", TEXT, "--out", TEXT), "the name of a folder, not of a file"),
        (("adapt", "a model", "--data", TEXT, "--out", "p"), "neither a path of this machine nor a name on the hub"),
        (("explain", MODEL, "--device", "gpu"), "a device of this machine: cpu"),
        (("tasks", MODEL, "--tasks", "a", "--device", "cpu0"), "(did you mean cpu?)"),
        (("generate", MODEL, "--prompt", "a", "--cache", "statc"), "(did you mean static?)"),
        (("tasks", MODEL, "--tasks", "a", "--prefill", "mask"), "(did you mean masked?)"),
        (
            ("finetune", MODEL, "--plan", str(PLAN), "--data", TEXT, "--out", "o", "--tokens", "9", "--method", "lara"),
            "Did you mean 'lora'?",
        ),
        ((*ADAPT[:-1], TEXT + "/plan"), "is not valid: expected a place that can be written"),
        ((*ADAPT, "--json", TEXT + "/facts.json"), "option --json="),
    ],
)  # fmt: skip
def test_nothing_is_loaded_before_a_mistake_is_noticed(args, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*args)
    assert result.exit_code == 2, (result.output, result.exception)
    assert text in result.stderr and result.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_a_budget_is_refused_with_the_command_that_takes_it():
    with pytest.raises(InvalidOption, match=r"one plan, at no loss: rana-fx adapt --recipe exact\b"):
        checks.recipe_with_budgets("exact")
    checks.recipe_with_budgets("rana")


def test_choices_are_those_of_the_library():
    # recipes that tests add are not
    assert set(choices.RECIPES) <= set(RECIPES) and "rana" in choices.RECIPES
    assert tuple(name for name in choices.RECIPES if not takes_budget(RECIPES[name])) == choices.WITHOUT_BUDGET
    code = "import rana_fx.recipes as r, rana_fx.choices as c; print(tuple(r.RECIPES) == c.RECIPES)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_near_misses():
    assert nearest("bytse", ("flops", "bytes")) == "bytes" and nearest("joules", ("flops", "bytes")) is None
    assert one_of("x", ("static", "dynamic")) == "one of static, dynamic"
    error = UnknownChoice(kind="metric", got="bytse", valid="flops, bytes")
    assert str(error) == "metric='bytse' is not known. Pick one of: flops, bytes. Did you mean 'bytes'?"


# ---- dtype


def test_auto_is_the_dtype_of_the_plan():
    plan = rana_fx.load_plan(PLAN.parent / "bf16")
    assert plan.dtype == "bfloat16" and dtype_for(plan, "auto") == "bfloat16" == dtype_for(plan, "bfloat16")
    assert dtype_for(None, "auto") == "auto" and dtype_for(None, "float16") == "float16"
    with pytest.raises(InvalidOption, match=r"option --dtype='float32' is not valid: expected bfloat16, in which the plan was"):
        dtype_for(plan, "float32")


@pytest.mark.parametrize("command", ["explain", "eval"])
def test_a_plan_in_bf16_is_used_without_naming_its_dtype(command, model, tmp_path):  # noqa: F811
    network, tokenizer = load_model(str(model), dtype="bfloat16", device="cpu")
    batches = [tokenizer("It was a dark evening, and so on.", return_tensors="pt") for _ in range(3)]
    rana_fx.adapt(network, batches, budget=0.6, recipe="teal", progress=False).save(tmp_path / "plan")
    text = ("--data", HELD_OUT, "--tokens", 100, "--context", 32) if command == "eval" else ()
    result = call(command, model, *text, "--plan", tmp_path / "plan", "--device", "cpu")
    assert result.exit_code == 0, result.output


def test_another_dtype_than_the_plans_says_what_to_pass(model, tmp_path):  # noqa: F811
    network, _ = load_model(str(model), dtype="float32", device="cpu")
    batches = [{"input_ids": torch.arange(3, 40)[None]}]
    plan = rana_fx.adapt(network, batches, budget=0.6, recipe="teal", progress=False)
    rana_fx.detach(network)
    with pytest.raises(rana_fx.RanaError, match=r"expected dtype float32 \(load it with dtype=torch.float32\)"):
        rana_fx.attach(network.to(torch.bfloat16), plan)


# ---- a file of options


def options_of(tmp_path, name, content, *args):
    """The options that a command gets, without running it."""
    seen = {}
    probe = typer.Typer()

    @probe.callback()
    def main() -> None:
        pass

    def command(
        model: str,  # noqa: F811
        budget: float = 0.58,
        max_new_tokens: int = 3,
        target: list[str] | None = None,
        thresholds: bool = False,
        config: Path = typer.Option(None, callback=config_file.read, is_eager=True),  # noqa: B008
    ) -> None:
        seen.update(model=model, budget=budget, max_new_tokens=max_new_tokens, target=target, thresholds=thresholds)

    probe.command("run")(command)
    probe.command("other")(command)
    path = tmp_path / name
    path.write_text(content)
    from typer.testing import CliRunner

    result = CliRunner().invoke(probe, ["run", *args, "--config", str(path)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.yaml",
            YAML,
        ),
        ("a.toml", TOML),
    ],
)
def test_options_from_a_file(tmp_path, name, content):
    expected = {"model": "m", "budget": 0.3, "max_new_tokens": 5, "target": ["a", "b"], "thresholds": True}
    assert options_of(tmp_path, name, content) == expected
    # given ones win, arguments as well
    given = options_of(tmp_path, name, content, "n", "--budget", "0.4", "--target", "c")
    assert given == expected | {"model": "n", "budget": 0.4, "target": ["c"]}


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.yaml", "budgte: 0.3", "option='budgte' is not known. Pick one of: .* Did you mean 'budget'?"),
        ("a.yaml", "run:\n  config: x", "option='config' is not known"),
        ("a.yaml", "budget: true", "budget=True is not valid: expected a value"),
        ("a.yaml", "thresholds: 3", "thresholds=3 is not valid: expected true or false"),
        ("a.yaml", "target:\n- {a: 1}", "expected a value, or a list of values"),
        ("a.yaml", "budget: [0.3]", "expected a value"),
        ("a.yaml", "- budget", "expected names of options with values"),
        ("a.yaml", "run: 3", "expected names of options below run"),
        ("a.yaml", "budget: [", "expected valid YAML"),
        ("a.toml", "budget = ", "expected valid TOML"),
        ("a.ini", "budget=3", "expected a .yaml, .yml or .toml file"),
    ],
)
def test_mistakes_in_a_file(tmp_path, name, content, text):
    with pytest.raises((InvalidOption, UnknownChoice), match=text):
        options_of(tmp_path, name, content, "m")


def test_a_file_of_options_that_is_not_there(tmp_path):
    result = call("explain", MODEL, "--config", tmp_path / "no.yaml")
    assert result.exit_code == 2 and "expected a file that can be read (No such file or directory)" in result.stderr


def test_values_of_a_file_are_checked_as_given_ones(tmp_path):
    (tmp_path / "a.yaml").write_text(f"data: {TEXT}\nout: {tmp_path / 'p'}\nbudget: 58\n")
    result = call("adapt", MODEL, "--config", tmp_path / "a.yaml")
    assert result.exit_code == 2 and "Did you mean 0.58?" in result.stderr


# ---- what is imported, and completion in the shell


def run_alone(code):
    env = os.environ | {"PYTHONPATH": str(Path(rana_fx.__file__).parent.parent)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


LOADED = "[name for name in ('torch', 'transformers', 'numpy', 'triton') if name in sys.modules]"


def test_neither_the_package_nor_help_nor_a_mistake_loads_torch():
    code = (
        f"import sys, rana_fx; print({LOADED}); from rana_fx.cli import app\n"
        "from typer.testing import CliRunner\n"
        "for args in (['--help'], ['adapt', '--help'], ['adapt', '/none', '--data', 'x', '--out', 'p']):\n"
        f"    print(CliRunner().invoke(app, args).exit_code, {LOADED})"
    )
    assert run_alone(code) == "[]\n0 []\n0 []\n2 []\n"


def test_names_of_the_package_are_there_when_they_are_used():
    code = (
        "import rana_fx\n"
        "print(sorted(rana_fx.__all__) == rana_fx.__all__, len(rana_fx.__all__), set(rana_fx.__all__) <= set(dir(rana_fx)))\n"
        "print(all(getattr(rana_fx, name) is not None for name in rana_fx.__all__), rana_fx.recipes.Rana.__name__)\n"
        "print(hasattr(rana_fx, 'nonsense'), hasattr(rana_fx, '_none'), rana_fx.backend is rana_fx._backend.backend)\n"
        "from rana_fx import *\n"
        "print(adapt is rana_fx.adapt)\n"
    )
    assert run_alone(code) == "True 10 True\nTrue Rana\nFalse False True\nTrue\n"


def test_the_shell_completes_commands_options_and_values():
    group = typer.main.get_command(app)
    spelled = {name for parameter in group.params for name in parameter.opts}
    assert {"--install-completion", "--show-completion"} <= spelled
    adapt = group.commands["adapt"]
    (recipe,) = (parameter for parameter in adapt.params if parameter.name == "recipe")
    with adapt.make_context("adapt", [], resilient_parsing=True) as context:
        assert {item.value for item in recipe.shell_complete(context, "r")} == {"rana"}
