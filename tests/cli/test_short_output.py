"""Commands are short by default: a model of any depth fits on 40 lines of 80 columns, with remarks counted and what is next."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import rana_fx
from rana_fx.commands.evaluate import by_role as densities_by_role
from rana_fx.commands.plan_table import show_plan
from rana_fx.commands.screen import LEGEND, Screen
from rana_fx.recipes.rana.unit_rows import UnitRows
from rana_fx.report import Report
from rana_fx.report_rows import Row, left_dense, too_few_tokens
from rana_fx.skips import Note, is_too_few
from tests.cli.test_cli import DATA, HELD_OUT, MODEL, TEXT, adapted, call, facts, model  # noqa: F401 - fixtures
from tests.unit.test_plan_text import deep

PLANS = Path(__file__).parents[1] / "golden" / "plans"
LAYERS = 30
AFTER = 10  # lines that a command prints after the plan or the report: totals, legend, what to do next


def lines_of(text):
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)
    return lines


@pytest.fixture(scope="module")
def plan():
    plan = deep(rana_fx.load_plan(PLANS / "recipe-rana"), LAYERS)
    few = tuple(Note(site.name, "40 calibration tokens are too few for its 512 ranks") for site in plan.sites[:36])
    return dataclasses.replace(plan, skips=(*plan.skips, *few))


def test_the_plan_of_a_deep_model_fits(plan, capsys):
    show_plan(Screen(), "plan", plan, every_adapter=False)
    printed = capsys.readouterr().out
    assert len(lines_of(printed)) <= 40 - AFTER
    # flagged on the screen, not only in the file
    assert "36 linears saw too few calibration tokens" in printed and "--tokens" in printed
    assert f"{len(plan.sites) + 1} remarks, the first 3:" in printed and "of the whole plan" in printed


def rows(role, count, **changed):
    row = Row("", role, "linear", (64, 32), "neuron", "16.0 of 32 kept, masked kernel up to 8 tokens", 0.5, 0.5, None, 8)
    return [dataclasses.replace(row, site=f"model.layers.{i}.{role}", **changed) for i in range(count)]


def report(notes=()):
    made = [row for role in ("attention_in", "attention_out", "up", "down", "other", "stem") for row in rows(role, LAYERS)]
    made += rows("router", LAYERS, action="dense", detail="its output selects experts")
    made += rows("head", 1, action="dense", detail="outside the blocks: it follows the last residual join, and so on")
    made += rows("constant", 3, action="skipped", detail="it reads nothing of the batch, so its cost is not one per token")
    made += rows("-", 2, action="skipped", detail="quantised layer", shape=())
    few = "16.0 of 32 kept; 40 calibration tokens are too few for its 512 ranks"
    made[:36] = [dataclasses.replace(row, detail=few) for row in made[:36]]
    memory = dict.fromkeys(("without a plan", "factors alone", "prefill=masked", "prefill=dense", "prefill=cheapest"), 10**9)
    return Report("LlamaForCausalLM", "0a1b2c3d4e5f", 0.58, 0.58, 0.58, len(made), 90, 30, 1, tuple(made), memory, tuple(notes))


@pytest.mark.parametrize("notes", [0, 1, 5])
def test_the_report_of_a_deep_model_fits(notes):
    found = report(["a remark that is longer than a line of the terminal that it is printed on, as some of them are"] * notes)
    lines = lines_of(str(found))
    assert len(lines) <= 40 - 4  # the command adds the expected cost, the legend and what to do next
    text = "\n".join(lines)
    assert "36 linears saw too few calibration tokens" in text and "0-5" in text and "24-29" in text
    assert f"{LAYERS} " in next(line for line in lines if line.lstrip().startswith("up "))
    if notes:
        assert f"{notes} remark{'s, the first 3' if notes > 3 else ''}:" in text
    assert len(found.lines(layers=True)) > len(found.rows)


def test_costs_by_role_are_means_by_size():
    half, whole = rows("up", 1, flops=0.25, shape=(30, 10)), rows("up", 2, flops=1.0, shape=(10, 10))
    text = str(dataclasses.replace(report(), rows=(*half, *whole[1:])))
    # 300 weights at .25 and 100 at 1
    assert "0.438" in text and "0.250" in text and "1.000" in text


def test_reasons_are_counted():
    made = [*rows("up", 3, action="dense", detail="a"), *rows("down", 1, action="dense", detail="b")]
    made += [*rows("other", 1, action="dense", detail="c"), *rows("head", 1, action="dense", detail="d")]
    lines = left_dense(made)
    assert lines[0] == "6 not adapted, the first 3 of 4 reasons:"
    assert lines[1:] == ["  model.layers.0.up and 2 more: a", "  model.layers.0.down: b", "  model.layers.0.other: c"]
    assert left_dense(rows("up", 2)) == [] and too_few_tokens([("a", "b")]) == []


def test_densities_by_role():
    roles = {f"layers.{i}.{role}": role for i in range(LAYERS) for role in ("up", "attention_in")}
    sites = [{"site": name, "density_expected": 0.5, "density_measured": 0.7 if name == "layers.7.up" else 0.5} for name in roles]
    columns, found = densities_by_role(sites, roles)
    assert columns[0] == "role" and [row[:2] for row in found] == [("up", LAYERS), ("attention in", LAYERS)]
    assert found[0][3] == pytest.approx(0.5 + 0.2 / LAYERS) and found[0][4] == "+0.200 layers.7.up"
    assert densities_by_role([{**sites[0], "density_measured": None}], roles)[1][0][2:] == (None, None, "-")


def test_what_a_recipe_says_of_too_few_tokens_is_recognised(monkeypatch):
    """The words are in two places of the recipes, and in plans of earlier versions."""
    assert is_too_few("36 calibration tokens are too few for its 512 ranks")
    torch.manual_seed(0)
    from tests.support.architectures import build, ids

    monkeypatch.setattr(
        "rana_fx.recipes.rana.make_candidates.rows_of",
        lambda problem, unit: UnitRows(None, 3, problem.rows(unit[0]).float()),
    )
    plan = rana_fx.adapt(build("plain_llama", 1)[0], [ids() for _ in range(2)], budget=0.8, progress=False)
    assert any(is_too_few(note) for site in plan.sites for note in plan.notes(site.name))


@pytest.mark.parametrize("command", ["adapt", "eval", "explain", "explain, dense"])
def test_commands_say_what_is_next_and_no_more_than_40_lines(command, model, adapted, tmp_path):  # noqa: F811
    text = ("--data", HELD_OUT, "--tokens", 300, "--context", 64)
    args = {
        "adapt": ("adapt", model, *text, "--out", tmp_path / "plan", "--recipe", "teal"),
        "eval": ("eval", model, *text, "--plan", adapted[0]),
        "explain": ("explain", model, "--plan", adapted[0]),
        "explain, dense": ("explain", model),
    }[command]
    result = call(*args, "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    commands = [line for line in lines if "rana-fx " in line]
    assert any(line.startswith("next: rana-fx ") for line in commands)
    # names of models and folders are not shortened
    lines_of("\n".join(line for line in lines if line not in commands and str(tmp_path.parent) not in line))
    if command != "eval":
        assert LEGEND[0] in lines


def test_quiet_prints_nothing_and_writes_the_same(model, adapted, tmp_path):  # noqa: F811
    out = tmp_path / "plan"
    args = ("--data", TEXT, "--out", out, "--budget", 0.6, "--recipe", "teal", "--tokens", 3000, "--context", 128, "--seed", 7)
    result = call("adapt", model, *args, "--device", "cpu", "--quiet", "--json", tmp_path / "a.json")
    assert result.exit_code == 0 and result.output == ""
    assert facts(tmp_path / "a.json", result)["digest"] == adapted[1]["digest"] == rana_fx.load_plan(out).digest()
    # the bar is on stderr otherwise
    assert "adapt 3/3 plan 100%" in adapted[2]
    assert json.loads((tmp_path / "a.json").read_text())["options"] == adapted[1]["options"] | {"out": str(out)}
