"""Names on the hub, paths that look like them, and devices are judged before anything is loaded, and near ones are named."""

from __future__ import annotations

import sys

import huggingface_hub
import pytest
import torch
import typer
from huggingface_hub import constants, errors

from rana_fx import devices
from rana_fx.cli import app
from rana_fx.commands import checks, hub_names
from rana_fx.errors import DatasetError, InvalidOption, ModelError
from tests.cli.test_checks import run_alone


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that sets what the hub answers; the cache holds one model and one data set."""
    for name in ("models--HuggingFaceTB--SmolLM2-135M", "datasets--Salesforce--wikitext"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here" / "smollm2-135m").mkdir(parents=True)
    (tmp_path / "here" / "text.jsonl").touch()
    monkeypatch.chdir(tmp_path / "here")
    asked = []

    def answers(error=None):
        def repo_info(self, name, *, repo_type, timeout):
            asked.append((name, repo_type))
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
        return asked

    return answers


def http(cls):
    """An error of the hub, whose response nobody reads."""
    error = cls.__new__(cls)
    Exception.__init__(error, "404")
    return error


def test_names_that_the_hub_knows(hub):
    asked = hub()
    assert checks.model("gpt2") == "gpt2" and checks.model("owner/model") == "owner/model"
    assert checks.data("wikitext:wikitext-2-raw-v1") == "wikitext:wikitext-2-raw-v1"
    assert asked == [("gpt2", "model"), ("owner/model", "model"), ("wikitext", "dataset")]


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (
            "HugingFaceTB/SmolLM2-135M",
            errors.RepositoryNotFoundError,
            "no public model of that name (did you mean HuggingFaceTB/SmolLM2-135M?); for a private one",
        ),
        ("smollm2-135", errors.RepositoryNotFoundError, r"(did you mean smollm2-135m?)"),
        ("google/gemma-2b", errors.GatedRepoError, "asked for on its page on the hub, then: hf auth login"),
        ("owner/model", errors.OfflineModeIsEnabled, "the hub cannot be reached, and the cache has no copy of it"),
        ("HuggingFaceTB/SmolLM2-135", OSError, "cache has no copy of it (did you mean HuggingFaceTB/SmolLM2-135M?)"),
    ],
)
def test_names_that_cannot_be_loaded(hub, name, error, text):
    hub(http(error))
    with pytest.raises(ModelError) as caught:
        checks.model(name)
    assert text in str(caught.value) and str(caught.value).startswith(f"{name} cannot be loaded as a model: ")


def test_data_that_the_hub_does_not_have(hub):
    hub(http(errors.RepositoryNotFoundError))
    with pytest.raises(DatasetError, match=r"no public dataset of that name \(did you mean Salesforce/wikitext\?\)"):
        checks.data("Salesforce/wikitxt:wikitext-2-raw-v1")
    with pytest.raises(DatasetError, match=r"did you mean text\.jsonl\?"):
        checks.data("textjsonl")


def test_what_is_in_the_cache_needs_no_hub_and_faults_of_the_hub_are_left_to_what_loads(hub):
    hub(http(errors.OfflineModeIsEnabled))
    assert checks.model("HuggingFaceTB/SmolLM2-135M")
    hub(http(errors.HfHubHTTPError))
    assert checks.model("owner/model")


def test_words_that_are_no_name_are_not_asked_about(hub):
    asked = hub()
    for word in ("a model", "owner/mo?el", "-x", "a--b"):
        with pytest.raises(ModelError, match="neither a path of this machine nor a name on the hub, such as HuggingFaceTB"):
            checks.model(word)
    assert asked == []


def test_completion_asks_nobody(hub):
    asked = hub()
    command = typer.main.get_command(app).commands["explain"]
    with command.make_context("explain", ["owner/model", "--device", "gpu"], resilient_parsing=True):
        pass
    assert asked == []


# ---- devices


@pytest.mark.parametrize(
    ("name", "count", "cuda", "text"),
    [
        ("gpu", 0, "13.0", "of this machine: cpu (PyTorch finds no GPU; leave it out for the best device there is)"),
        ("cuda:0", 0, None, "of this machine: cpu (this PyTorch is built for the CPU alone; leave it out"),
        ("cuda:7", 2, "13.0", "of this machine: cpu, cuda:0, cuda:1 (did you mean cuda:"),
        ("gpu", 1, "13.0", "(did you mean cuda?)"),
        ("gpu:1", 2, "13.0", "(did you mean cuda:1?)"),
        ("cuda1", 2, "13.0", "(did you mean cuda:1?)"),
        ("CPU ", 0, None, "(did you mean cpu?)"),
        ("auto", 0, None, "(leave it out for the best device there is)"),
        ("meta", 0, None, "of this machine: cpu."),
    ],
)
def test_devices(monkeypatch, name, count, cuda, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", cuda)

    def refuse(*_, **__):
        raise RuntimeError("no such device")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(InvalidOption) as caught:
        checks.device(name)
    assert text in f"{caught.value}." and f"device={name!r} is not valid" in str(caught.value)


def test_the_cpu_and_the_default_need_no_torch():
    code = "import sys; from rana_fx.commands import checks\n"
    code += "print(checks.device(None), checks.device('cpu'), 'torch' in sys.modules)"
    assert run_alone(code) == "None cpu False\n"
    assert devices.known_device(None).type in ("cpu", "cuda") and "torch" in sys.modules
    assert hub_names.why_not("..") != ""
