"""bench.kernels: every operation at toy sizes is correct and recorded; errors about options and a missing GPU."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("triton")

from bench.speed import baseline_kernels, kernels, operands, rival_matmuls
from bench.speed.kernels import main, measure, run
from bench.speed.rival_matmuls import RivalMatmul, tinygemm_operands
from bench.speed.shapes import MODELS, shapes
from bench.speed.timing import Times, error_ratio
from bench.speed.tried_configs import configs_table, worst_ratios
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
    rows = run(**OPTIONS, seconds=300.0, tune="", out=out, interpret=True)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert all(row["passed"] for row in rows)
    found = {(row["op"], row["impl"], row["bits"]) for row in rows}
    assert found >= {(op, "masked", bits) for op in ("masked_gemv", "gated_gemv") for bits in (16, 4)}
    assert found >= {("router", "router", 4), ("masked_gemv", "published", 16), ("masked_gemv", "fallback", 16)}
    assert ("router", "router+norm", 4) in found
    ours = [row for row in rows if row["impl"] in ("masked", "router", "router+norm")]
    assert all(row["bit_equal"] and row["config"] for row in ours)


def on_cpu(weight, tokens):
    """tinygemm's operands, multiplied by the CPU's kernel, which takes multiples of 16 outputs."""
    codes, scales_and_zeros, meant = tinygemm_operands(weight)
    if weight.shape[0] % 16:
        return RivalMatmul(lambda x: torch.nn.functional.linear(x, meant), meant, codes.nbytes, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)
    return RivalMatmul(
        lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scales_and_zeros), meant, packed.nbytes, 1
    )


def compared_with_its_input(weight, tokens):
    return on_cpu(weight, tokens)._replace(weight=weight)


def without_a_kernel(weight, tokens):
    raise RuntimeError("no kernel for this device")


@pytest.mark.skipif(not gather.INTERPRETED, reason="runs under the interpreter")
@pytest.mark.parametrize("name", ["toy/down", "toy/router", "toy/silu(gate)*up"])
def test_rivals_are_compared_with_their_own_weight_and_count_in_their_bits(name, monkeypatch, capsys):
    (shape,), device = shapes([name]), torch.device("cpu")
    monkeypatch.setattr(baseline_kernels, "by_inductor", lambda function, tuned: function)
    routers = operands.Case._router_trials
    monkeypatch.setattr(operands.Case, "_router_trials", lambda case, tune: {"router": routers(case, tune)["router"]})

    def rows_of(width, times, **matmuls):
        """Rows by implementation. ``times``: in the order dense, gemlite, int4, this package's kernel."""
        left = iter(times)
        monkeypatch.setattr(kernels, "timed", lambda calls, device: Times(*[next(left)] * 3))
        for key, matmul in matmuls.items():
            monkeypatch.setitem(rival_matmuls.MATMULS, key, matmul)
        found = measure(shape, [0], 3, width, {"cublas", "int4", "gemlite"}, device, {})
        return {"ours" if row["impl"] in ("masked", "router") else row["impl"]: row for row in found}

    rows = rows_of(4, [12.0, 6.0, 8.0], int4=on_cpu, gemlite=without_a_kernel)
    assert list(rows) == ["cublas", "int4", "ours"] and all(row["passed"] for row in rows.values())
    assert f"gemlite, {name}: not timed: RuntimeError: no kernel" in capsys.readouterr().err
    assert (rows["int4"]["bits"], rows["int4"]["masked"], rows["int4"]["speedup"]) == (4, 0, 2)
    assert [rows["ours"][key] for key in ("speedup", "rival_us", "over_rival")] == [1.5, 6.0, 0.75]
    rows = rows_of(4, [12.0, 3.0, 6.0, 8.0], gemlite=on_cpu)
    assert (rows["ours"]["rival_us"], rows["ours"]["over_rival"]) == (3.0, 3 / 8)
    # the weight before rounding is not what it multiplies by: wrong, so it is no rival
    rows = rows_of(4, [12.0, 3.0, 6.0, 8.0], gemlite=compared_with_its_input)
    assert not rows["gemlite"]["passed"] and rows["gemlite"]["speedup"] is None
    assert rows["ours"]["rival_us"] == 6.0
    rows = rows_of(8, [12.0, 8.0])
    assert list(rows) == ["cublas", "ours"] and rows["ours"]["rival_us"] is rows["ours"]["over_rival"] is None


def test_a_tuned_row_has_the_time_of_every_config_the_default_first(monkeypatch):
    (shape,), times = shapes(["toy/router"]), iter([5.0, 4.0, 3.0, 2.0, *[6.0] * 99])

    def measured(trial, bytes_read, device):
        us = next(times)
        return {"us": Times(us, us, us)._asdict(), "passed": us != 2.0, "config": trial.config}

    monkeypatch.setattr(kernels, "check_and_time", measured)
    alone, normed = measure(shape, [0], 1, 16, set(), torch.device("cpu"), {}, tuned={"router"})
    default = operands.router.default_config(shape.N, shape.K, 1, bits=16)
    assert alone["us"]["p50"] == 3.0 and alone["config"] == alone["tried"][2]["config"]
    assert [row["us"] for row in alone["tried"][:4]] == [5.0, 4.0, 3.0, 2.0] and not alone["tried"][3]["passed"]
    assert alone["tried"][0]["config"] == normed["config"] == dataclasses.asdict(default) and "tried" not in normed


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of the packages compared with
@pytest.mark.parametrize("name", ["int4", "gemlite"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_rival_matmuls_on_a_gpu(name, tokens):
    if name == "gemlite":
        pytest.importorskip(name)
    weight = torch.randn(512, 1024, device="cuda").bfloat16() / 32
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    matmul = rival_matmuls.MATMULS[name](weight, tokens)
    exact, magnitude = x.double() @ matmul.weight.double().t(), x.double().abs() @ matmul.weight.double().t().abs()
    assert error_ratio(matmul.call(x), exact, magnitude, 1024, matmul.roundings) <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_an_error():
    result = CliRunner().invoke(app(), [])
    assert result.exit_code == 2
    assert "NVIDIA GPU" in result.stderr
    assert "--interpret" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("masked", "most"), ("masked", "101"), ("tokens", "17"), ("bits", "5"), ("baselines", "trt"), ("tune", "published")],
)
def test_impossible_options_are_refused(option, value):
    with pytest.raises(InvalidOption, match="rivals" if option == "baselines" else option):
        run(**OPTIONS | {"tune": ""} | {option: value}, seconds=1.0, out=None, interpret=True)


def test_configs_are_compared_over_all_masked_fractions(capsys):
    """The fastest at one fraction is not the best; one without a time at some fraction is none."""

    def row(masked, **us):
        tried = [{"config": {"splits": int(name[1:])}, "us": us[name], "passed": us[name] > 0} for name in us]
        return {"impl": "tensor_cores", "shape": "o", "bits": 16, "tokens": 1, "masked": masked, "tried": tried}

    rows = [row(0, c1=15.0, c2=10.0, c3=11.0, c4=10.5), row(50, c1=5.0, c2=8.0, c3=6.0, c4=-1.0), {"impl": "cublas"}]
    (found,) = worst_ratios(rows).values()
    assert [(label, default) for _, label, default in found] == [("splits 3", False), ("splits 1", True), ("splits 2", False)]
    assert [ratio for ratio, *_ in found] == pytest.approx([1.2, 1.5, 1.6])
    configs_table(rows)
    assert capsys.readouterr().out.count("splits") == 3
    configs_table(rows[2:])
    assert capsys.readouterr().out == ""


def test_shapes_are_those_of_the_models():
    found = {shape.name: (shape.K, shape.N) for name in MODELS for shape in shapes([name])}
    assert found["llama-2-7b/qkv"] == (4096, 12288)
    assert found["llama-2-7b/gate+up"] == (4096, 22016)
    assert found["llama-3-8b/qkv"] == (4096, 6144)
    assert found["gemma-2b/down"] == (16384, 2048)
    assert found["pythia-1.4b/up"] == (2048, 8192)
    assert shapes(["llama-2-7b/o"])[0].name == "llama-2-7b/o"
    assert shapes(["llama-2-7b/router:2384"]) == [("llama-2-7b/router:2384", "router", 4096, 2384)]
    for unknown in ("llama-2-7b/o:7", "llama-2-7b/router:", "llama-2-7b/router:x", "router:7"):
        with pytest.raises(UnknownChoice, match=unknown):
            shapes([unknown])
    with pytest.raises(UnknownChoice, match="llama-2-7b"):
        shapes(["llama-9"])
