"""bench.kernels: every operation at toy sizes is correct and recorded; errors about options and a missing GPU."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("triton")

from bench.speed.kernels import main, run
from bench.speed.shapes import MODELS, shapes
from rana_fx.errors import InvalidOption, UnknownChoice
from rana_fx.kernels.triton import compaction as gather

OPTIONS = {"names": "toy", "masked": "50", "tokens": "1", "bits": "16,4", "baselines": "cublas,published,fallback"}


def app():
    found = typer.Typer()
    found.command()(main)
    return found


@pytest.mark.skipif(not gather.INTERPRETED, reason="runs under the interpreter")
def test_toy_sizes_are_right_and_recorded(tmp_path):
    out = tmp_path / "rows.jsonl"
    rows = run(**OPTIONS, seconds=300.0, tune=False, out=out, interpret=True)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert all(row["passed"] for row in rows)
    found = {(row["op"], row["impl"], row["bits"]) for row in rows}
    assert found >= {(op, "masked", bits) for op in ("masked_gemv", "gated_gemv") for bits in (16, 4)}
    assert found >= {("router", "router", 4), ("masked_gemv", "published", 16), ("masked_gemv", "fallback", 16)}
    ours = [row for row in rows if row["impl"] in ("masked", "router")]
    assert all(row["bit_equal"] and row["config"] for row in ours)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_an_error():
    result = CliRunner().invoke(app(), [])
    assert result.exit_code == 2
    assert "NVIDIA GPU" in result.stderr
    assert "--interpret" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("masked", "most"), ("masked", "101"), ("tokens", "17"), ("bits", "5"), ("baselines", "trt")]
)
def test_impossible_options_are_refused(option, value):
    with pytest.raises(InvalidOption, match="rivals" if option == "baselines" else option):
        run(**OPTIONS | {option: value}, seconds=1.0, tune=False, out=None, interpret=True)


def test_shapes_are_those_of_the_models():
    found = {shape.name: (shape.K, shape.N) for name in MODELS for shape in shapes([name])}
    assert found["llama-2-7b/qkv"] == (4096, 12288)
    assert found["llama-2-7b/gate+up"] == (4096, 22016)
    assert found["llama-3-8b/qkv"] == (4096, 6144)
    assert found["gemma-2b/down"] == (16384, 2048)
    assert found["pythia-1.4b/up"] == (2048, 8192)
    assert shapes(["llama-2-7b/o"])[0].name == "llama-2-7b/o"
    with pytest.raises(UnknownChoice, match="llama-2-7b"):
        shapes(["llama-9"])
