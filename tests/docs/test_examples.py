"""Programs and notebooks of examples/ run, on the first layer of the embedded model and little text.

Programs run in this process, as ``python examples/NAME.py`` with arguments would; notebooks in one kernel, with a cell of
smaller values behind the one that is tagged "parameters". Graphs run as they are rewritten, without Inductor.
"""

from __future__ import annotations

import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import rana_fx
from tests.cli.test_cli import model  # noqa: F401 - a fixture
from tests.docs.snippets import ROOT

EXAMPLES = ROOT / "examples"
SMALL = ("--tokens", "1600", "--context", "32")
# program: arguments, what it prints at the end, the plans that it saves
PROGRAMS = {
    "adapt_and_save.py": ((*SMALL, "--budget", "0.6"), r"expected flops 0\.6.*saved in plan: rana_fx\.attach\(", ["plan"]),
    "generate.py": (("--tokens", "1600", "--new-tokens", "3"), r"adapted, \S+ ms a token:\n  The sea .*dense, .*  The sea ", []),
    "quality_target.py": ((*SMALL, "--max-kl", "0.5", "--recipe", "teal"), r"nats per token.*<- chosen", ["plan"]),
    "recover_quality.py": (
        (*SMALL, "--calibration-tokens", "800", "--test-tokens", "800", "--recipe", "teal"),
        r"perplexity: dense \S+, adapted (?P<before>[\d.]+), adapted and trained (?P<after>[\d.]+)\n",
        ["tuned/plan"],
    ),
    "own_transformer.py": (("--steps", "2"), r"dense (?P<dense>\d\.\d+), adapted (?P<adapted>\d\.\d+)\n", []),
}
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
INSTEAD = """
import importlib
MODEL, TOKENS, CONTEXT, NEW_TOKENS, RECIPE, BUDGETS = {model!r}, 1600, 32, 2, "teal", [0.6, 0.8]
importlib.import_module("torch._inductor.compile_fx").compile_fx = lambda graph_module, inputs, **_: graph_module.forward
importlib.import_module("rana_fx.evaluation.decoding").ROUNDS = 1
"""


def test_these_are_all():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROGRAMS)
    assert len(NOTEBOOKS) == 2
    named = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text()))
    assert named == {*PROGRAMS, *(path.name for path in NOTEBOOKS)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs(name, model, tmp_path, monkeypatch, capsys, graphs_as_rewritten):  # noqa: F811
    given, printed, plans = PROGRAMS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rana_fx.targets.STEP", 0.2)  # a search of few budgets
    which = () if name == "own_transformer.py" else ("--model", str(model))
    monkeypatch.setattr(sys, "argv", [name, *which, *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    found = re.search(printed, capsys.readouterr().out, re.DOTALL)
    assert end.value.code == 0 and found
    for folder in plans:
        assert rana_fx.load_plan(folder).adapters
    # what was compiled has a plan applied
    if name in ("generate.py", "own_transformer.py", "recover_quality.py"):
        assert any("rana.masked_gemv" in str(node.target) for graph in graphs_as_rewritten for node in graph.graph.nodes)
    numbers = {key: float(value) for key, value in found.groupdict().items()}
    if name == "recover_quality.py":
        assert numbers["after"] < numbers["before"]
    if name == "own_transformer.py":
        # ln 256 = 5.5 is a guess of every byte; a mask of a hardly trained model changes little
        assert numbers["dense"] < 5.5 and abs(numbers["adapted"] - numbers["dense"]) < 0.1


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_needs_no_arguments(name):
    main = runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]
    defaults = {key: value.default for key, value in inspect.signature(main).parameters.items()}
    assert inspect.Parameter.empty not in defaults.values()
    paths = [value for value in defaults.values() if isinstance(value, str) and value.startswith("/")]
    assert all(Path(path).exists() for path in paths)
    assert 20 <= len((EXAMPLES / name).read_text().splitlines()) <= 70


@pytest.fixture(scope="module")
def executed(model, tmp_path_factory):  # noqa: F811
    """The folder of the notebooks with their outputs."""
    folder = tmp_path_factory.mktemp("notebooks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.run_notebooks", str(folder), *map(str, NOTEBOOKS)],
        input=INSTEAD.format(model=str(model)), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, executed):
    cells = json.loads((executed / path.name).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    text = "".join("".join(output.get("text", [])) for output in outputs)
    said = {"adapt_and_compare": "nats per token; the most probable", "how_a_token_decides": "of the energy"}
    assert said[path.stem] in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    """Their outputs would be those of one machine, and make every change of a cell unreadable."""
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
