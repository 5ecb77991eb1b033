"""Numbers, paths and texts that make no sense end with one message, exit code 2 and nothing written; Ctrl-C with 130."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rana_fx
from rana_fx import _interrupts
from rana_fx.cli import app
from rana_fx.commands import explain
from rana_fx.commands.record import write_json
from rana_fx.errors import InvalidOption
from rana_fx.evaluation.text import load_texts

DATA = Path(rana_fx.__file__).parent / "data"
MODEL, TEXT = str(DATA / "tiny-llama-prose-5m"), str(DATA / "calib.jsonl.xz")
ADAPT = ("adapt", MODEL, "--data", TEXT, "--out", "plan")
PLAN = str(Path(__file__).parents[1] / "golden" / "plans" / "rank")
FINETUNE = ("finetune", MODEL, "--plan", PLAN, "--data", TEXT, "--out", "tuned", "--tokens", "4096")
HUGE = str(10**40)


def call(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(result, text):
    assert result.exit_code == 2, (result.output, result.exception)
    assert text in " ".join(result.stderr.replace("│", " ").split()) and "Traceback" not in result.output, result.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        *(((*ADAPT, "--budget", value), "budget=") for value in ("nan", "inf", "-1", "0", "1e308")),
        *(((*ADAPT, "--tokens", value), "'--tokens'") for value in ("-1", "0", "1e308", "nan", HUGE)),
        *(((*ADAPT, "--context", value), "context") for value in ("-1", "0", "1e308", HUGE)),
        *(((*ADAPT, "--batch-size", value), "'--batch-size'") for value in ("-1", "0", "1e308", HUGE)),
        *(((*ADAPT, "--seed", value), "'--seed'") for value in (HUGE, f"-{HUGE}", "nan")),
        *(((*FINETUNE, "--tokens", value), "'--tokens'") for value in ("0", HUGE)),
        *(((*FINETUNE, "--rank", value), "'--rank'") for value in ("0", HUGE)),
        *(((*FINETUNE, "--lr", value), "option --lr=") for value in ("nan", "inf", "-1", "0")),
        *(((*FINETUNE, "--weight-decay", value), "option weight_decay=") for value in ("nan", "inf", "-1")),
        *(((*FINETUNE, "--clip", value), "option clip=") for value in ("nan", "-1", "0")),
        *(((*FINETUNE, "--warmup", value), "option warmup=") for value in ("nan", "1e308", "-1")),
        *(((*FINETUNE, "--distill", value), "option distill=") for value in ("nan", "1e308", "-1")),
        (("generate", MODEL, "--prompt", "a", "--max-new-tokens", HUGE), "'--max-new-tokens'"),
        (("generate", MODEL, "--prompt", "a \udcff b"), "option prompt='a \\udcff b' is not valid: expected text in UTF-8"),
        (("explain", MODEL, "--device", "meta"), "option device='meta' is not valid: expected a device of this machine: cpu"),
        (("explain", MODEL, "--device", "cpu:77:1"), "option device="),
        (("explain", MODEL, "--device", ""), "option device="),
        (("tasks", MODEL, "--tasks", "a", "--device", "meta"), "option device='meta' is not valid"),
        (("tasks", MODEL, "--tasks", "a", "--seed", "-1"), "option --seed=-1 is not valid"),
        (("explain", MODEL, "--json", ""), "option --json='.' is not valid: expected the name of a file, not of a folder"),
        (("explain", MODEL, "--json", "/"), "option --json='/' is not valid"),
        ((*ADAPT[:-1], TEXT), "is not valid: expected the name of a folder, not of a file"),
    ],
)  # fmt: skip
def test_absurd_arguments(args, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call(*args), text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"caf\xe9 au lait"), ("a.jsonl", b'{"text": "caf\xe9"}\n'), ("a.json", b"\xff\xfe\x00"), ("a.parquet", b"no")],
)
def test_data_that_is_not_utf_8(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(rana_fx.RanaError, match="cannot be read as a dataset: (?!DatasetGenerationError)") as caught:
        load_texts(tmp_path / name)
    assert ("utf-8" in str(caught.value).lower()) == (name in ("a.txt", "a.jsonl"))


def test_json_goes_where_it_is_told(tmp_path):
    facts = {"a": 1}
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "real.json").chmod(0o600)
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", facts)
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text()) == facts
    assert stat.S_IMODE((tmp_path / "real.json").stat().st_mode) == 0o600
    os.mkfifo(tmp_path / "fifo")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_text()))
    reader.start()
    write_json(tmp_path / "fifo", facts)
    reader.join()
    assert json.loads(got[0]) == facts and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    (tmp_path / "null").symlink_to(os.devnull)
    write_json(tmp_path / "null", facts)
    assert (tmp_path / "null").is_symlink() and stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    with pytest.raises(InvalidOption, match=r"a file that can be written \(Is a directory\)"):
        write_json(tmp_path, facts)


def test_names_that_are_no_text_are_printed(tmp_path):
    """A file name is bytes: what cannot be printed is escaped, after all the work is done."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.json")
    code = "import sys; from rana_fx.cli import app; app()"
    script = [sys.executable, "-c", code, "explain", MODEL, "--device", "cpu", "--plan", name]
    done = subprocess.run(script, capture_output=True, check=False)
    assert done.returncode == 2 and b"caf\\udce9.json is not a readable plan" in done.stderr, done.stderr


def test_ctrl_c_while_a_command_runs(monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "facts_of", stop)
    monkeypatch.setattr("rana_fx.evaluation.perplexity.load_model", stop)
    result = call("explain", MODEL)
    assert (result.exit_code, result.stderr) == (130, "interrupted.\n")


def test_a_ctrl_c_that_became_another_error(monkeypatch):
    def stop(*_, **__):
        _interrupts._seen.append(2)
        raise ImportError("numpy could not be imported")

    monkeypatch.setattr("rana_fx.evaluation.perplexity.load_model", stop)
    monkeypatch.setattr(_interrupts, "_seen", [])
    result = call("explain", MODEL)
    assert (result.exit_code, result.stderr) == (130, "interrupted.\n")


def heed_ctrl_c():
    """In a process before it starts: one that a shell runs in the background, and so its children, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("program", ["script", "module"])
def test_ctrl_c_during_imports(tmp_path, program):
    """As soon as torch begins to be imported, which takes a second or more."""
    (tmp_path / "rana-fx").write_text("import sys\nfrom rana_fx.cli import app\nsys.exit(app())\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Tell:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        f"            open({str(tmp_path / 'begun')!r}, 'w').close()\n"
        "            import time; time.sleep(20)\n"
        "sys.meta_path.insert(0, Tell())\n"
    )
    root = str(Path(rana_fx.__file__).parents[1])
    words = [str(tmp_path / "rana-fx")] if program == "script" else ["-m", "rana_fx.cli"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    running = subprocess.Popen(
        [sys.executable, *words, "explain", MODEL], env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    while not (tmp_path / "begun").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    assert running.communicate()[1] == "interrupted.\n" and running.returncode == 130
