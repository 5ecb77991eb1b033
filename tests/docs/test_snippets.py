"""What pages of the documentation show runs, in order and page by page, and their commands have these options.

It runs in a folder that looks like a clone, with a random model of one small layer in place of the embedded one and little text,
and graphs run as they are rewritten, without Inductor: what is shown is tested, what is compiled has its own tests. Names that a
page may use without defining them are in ``names``. The Python of README is run by tests/integration/test_readme.py.
"""

from __future__ import annotations

import importlib
import json
import lzma
import re
import runpy
import shutil
import unittest

import pytest
import torch
import typer.main
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import rana_fx
from rana_fx.cli import app
from rana_fx.evaluation.perplexity import load_model
from rana_fx.evaluation.text import load_texts, token_batches
from rana_fx.recipes import RECIPES
from tests.docs.snippets import FENCED, PAGES, ROOT, commands, parsed
from tests.support.architectures import ARCHITECTURES, VOCAB

DATA = ROOT / "rana_fx" / "data"
NAME = "tiny-llama-prose-5m"
RUN = [page for page in PAGES if page != "README.md" and any(type(e.parsed) is not tuple for e in parsed(page).examples())]
COMMANDS = [command for page in PAGES for command in commands(page)]
# their model is one of transformers; a plain module is traced in a third of the time
OF_TRANSFORMERS = ("docs/how-to/finetune.md",)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with what pages name by a path."""
    folder = tmp_path_factory.mktemp("clone")
    data = folder / "rana_fx" / "data"
    data.mkdir(parents=True)
    _, tokenizer = load_model(str(DATA / NAME), device="cpu")
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes)).eval()
    model.save_pretrained(data / NAME)
    tokenizer.save_pretrained(data / NAME)
    for name, documents in (("calib", 12), ("eval", 9)):
        # parts of documents: each as long as a context of a few dozen tokens
        texts = [text[start : start + 300] for text in load_texts(DATA / f"{name}.jsonl.xz")[:4] for start in range(0, 900, 300)]
        with lzma.open(data / f"{name}.jsonl.xz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[:documents])
    rana_fx.adapt(model, batches_in(data, tokenizer), budget=0.6, recipe="teal", progress=False).save(folder / "plan")
    return folder


def batches_in(data, tokenizer):
    return token_batches(load_texts(data / "calib.jsonl.xz"), tokenizer, context=32, batch_size=4)


@pytest.fixture
def names(request, clone, tmp_path, monkeypatch):
    """What programs of a page continue: a model, batches of text, a plan in the folder "plan"."""
    (tmp_path / "rana_fx").symlink_to(clone / "rana_fx")
    shutil.copytree(clone / "plan", tmp_path / "plan")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rana_fx.targets.STEP", 0.9)  # a search of few budgets
    monkeypatch.setattr("rana_fx.evaluation.decoding.ROUNDS", 1)
    if request.node.callspec.params["page"] in OF_TRANSFORMERS:
        model, tokenizer = load_model(f"rana_fx/data/{NAME}", device="cpu")
        batches = batches_in(clone / "rana_fx" / "data", tokenizer)
    else:
        model = ARCHITECTURES["plain_llama"].build(1).eval()
        batches = [{"input_ids": torch.randint(3, VOCAB, (4, 24))} for _ in range(16)]
    before = dict(RECIPES)
    yield {"torch": torch, "rana_fx": rana_fx, "model": model, "batches": batches}
    RECIPES.clear()
    RECIPES.update(before)


def shell(words):
    """Run a command of a page; what is no command of ours has to be marked as not run."""
    assert words[0] == "rana-fx", f'{words} cannot run here: write <!--- skip: next "REASON" --> before its block'
    result = CliRunner().invoke(app, [*words[1:], *([] if words[1] == "env" else ["--device", "cpu"])])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", RUN)
@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_page_runs(page, names):
    document = parsed(page, shell)
    document.namespace.update(names)
    for example in document.examples():
        try:
            example.evaluate()
        except unittest.SkipTest:
            continue


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] != "git"], ids=str)
def test_commands_have_these_options(command):
    found = taken_by(command)
    if found is None:
        return
    known, needed = found
    given = {word.partition("=")[0] for word in command.words if word.startswith("--")}
    assert given <= known
    assert "..." in command.words or needed <= given


def taken_by(command):
    """(options, options that are required) of a command; None: it is no program of ours."""
    program, *words = command.words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
        return None
    if program == "rana-fx":
        group = typer.main.get_command(app)
        assert words[0].startswith("-") or words[0] in group.commands
        return options_of(group if words[0].startswith("-") else group.commands[words[0]])
    if words[:1] == ["-m"] and words[1].startswith("bench"):
        return options_of(bench(words[1]))
    if words[:1] == ["-m"] and words[1].startswith(("rana_fx", "tests")):
        assert importlib.util.find_spec(words[1]) is not None
    elif words[0].startswith("examples/"):
        return options_of(typer_of(runpy.run_path(str(ROOT / words[0]))["main"]))
    return None


def bench(name):
    """The command of ``python -m bench.NAME``: its ``main``, or its ``app``."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    return typer_of(module.main)


def typer_of(main):
    made = typer.Typer()
    made.command()(main)
    return typer.main.get_command(made)


def options_of(command):
    spelled = [(parameter, [*parameter.opts, *parameter.secondary_opts]) for parameter in command.params]
    for other in getattr(command, "commands", {}).values():
        spelled += [(parameter, [*parameter.opts, *parameter.secondary_opts]) for parameter in other.params]
    needed = {opts[0] for parameter, opts in spelled if parameter.required and opts[0].startswith("--")}
    known = {name for _, opts in spelled for name in opts} | {"--help", "--version", "--install-completion"}
    return known, needed


@pytest.mark.parametrize("page", PAGES)
def test_what_does_not_run_says_why(page):
    """A block that is indented instead of fenced would not be found."""
    text = (ROOT / page).read_text()
    indented = re.findall(r"^ {4,}(?:rana-fx|python -m|make|pip) .*", FENCED.sub("", text), re.MULTILINE)
    assert not indented
    skips = re.findall(r"<!---* *skip:.*", text)
    assert all(re.fullmatch(r'<!--- skip: next "[^"]{10,}" -->', skip) for skip in skips)
    # Sybil takes the next block that it knows, so a mark before another one would skip too much
    marks = re.findall(r"<!--- skip: next .*\n(.*)", text)
    assert set(marks) <= {"```bash", "```python"}


def test_a_command_that_cannot_run_is_refused():
    with pytest.raises(AssertionError, match="skip: next"):
        shell(("make", "test"))
