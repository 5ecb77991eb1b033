"""``rana-fx env``: facts that a report of a fault needs."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from rana_fx.cli import app
from rana_fx.commands import env
from rana_fx.kernels import registry
from rana_fx.kernels.registry import Implementation


def test_it_shows_versions_the_machine_and_kernels(tmp_path):
    result = CliRunner().invoke(app, ["env", "--json", str(tmp_path / "env.json")])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "env.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__ and torch.__version__ in result.stdout
    assert str(torch.get_num_threads()) in facts["machine"]["threads"]
    assert {(one["device"], one["bits"]) for one in facts["kernels"]} >= {("cpu", 16), ("cpu", 8), ("cpu", 4)}


def test_a_kernel_that_is_passed_over_is_named_with_the_reason():
    refusing = Implementation("masked_gemv", "refusing", "cpu", accepts=lambda _: "too small", launch=print, lower=print)
    unregister = registry.register_implementation(refusing)
    try:
        found = env.choices()[0]
    finally:
        unregister()
    assert found.passed == {"refusing": "too small"} and found.chosen == "cpp"


def test_a_machine_without_a_compiler_is_described(monkeypatch):
    from torch._inductor import cpp_builder

    def missing():
        raise RuntimeError("no g++")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert env.machine()["C++ compiler"] == "none (no g++)"


@pytest.mark.gpu
def test_a_gpu_is_described():
    assert torch.cuda.get_device_name(0) in env.machine()["GPU 0"]
    assert {one.device for one in env.choices()} == {"cpu", "cuda"}
