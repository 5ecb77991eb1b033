"""Rivals of bench.decode: each gets a copy of the weights, a failure has a row with its reason, wrong logits give no time."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

from bench.common.models import SHAPES, build
from bench.speed import rivals
from bench.speed.decode import main
from bench.speed.random_plan import PlanConfig, layout_of
from bench.speed.rival_matmuls import rounded, tinygemm_operands
from bench.speed.rivals import RIVALS, Rival, linears_of, quantised
from bench.speed.variants import Variant, on_model, variants
from bench.speed.verify import check_logits, record_expected

CPU = torch.device("cpu")
# the subject is the protocol, not Inductor
AS_REWRITTEN = pytest.mark.usefixtures("graphs_as_rewritten")
OPTIONS = {"sequences": 1, "longest": 4, "new_tokens": 3, "prefill": 0, "dtype": "float32", "device": "cpu"}


def rows_of(path, kind):
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


@pytest.fixture
def seen(monkeypatch):
    """Two rivals that overwrite the weights they are given, and the weights they saw."""
    found = {}

    def rival(label, factor, **options):
        def quantise(model, names):
            found[label] = {name: model.get_submodule(name).weight.clone() for name in sorted(names)}
            inductor.coordinate_descent_tuning = True
            torch.set_float32_matmul_precision("high")
            for name in names:
                model.get_submodule(name).weight.mul_(factor)

        monkeypatch.setitem(RIVALS, label, Rival(quantise, 0.5, **options))

    rival("half", 0.5)
    rival("twice", 2.0, head=False)
    return found


@AS_REWRITTEN
def test_rivals_do_not_pile_up(seen, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    settings = inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    main("tiny", out, names="half,eager,twice", batches="1,2", **OPTIONS)
    assert rows_of(out, "skipped") == []
    rows = rows_of(out, "decode")
    assert [(row["variant"], row["batch"]) for row in rows] == [
        (name, batch) for name in ("eager", "half", "twice") for batch in (1, 2)
    ]
    assert [row["variant_kind"] for row in rows[2:]] == ["half"] * 2 + ["twice"] * 2
    assert all(row["gate"]["passed"] and row["mode"] == "reduce-overhead" for row in rows[2:])
    assert set(seen["half"]) - set(seen["twice"]) == {"lm_head"}
    assert all(torch.equal(weight, seen["half"][name]) for name, weight in seen["twice"].items())
    assert (inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == settings
    assert "twice" in capsys.readouterr().out


@AS_REWRITTEN
def test_bytes_are_those_of_the_quantised_linears(seen, tmp_path):
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="eager,half,twice", **OPTIONS)
    read = {row["variant"]: row["weight_gb_per_s"] * row["ms_per_token"]["p50"] * 1e6 for row in rows_of(out, "decode")}
    counts = {label: sum(weight.numel() for weight in found.values()) for label, found in seen.items()}
    head = counts["half"] - counts["twice"]
    assert head == 128 * 64
    assert read["eager"] == pytest.approx(4 * counts["half"])
    assert read["half"] == pytest.approx(0.5 * counts["half"])
    assert read["twice"] == pytest.approx(0.5 * counts["twice"] + 4 * head)


@AS_REWRITTEN
def test_a_rival_that_fails_has_a_row_and_the_next_one_is_timed(seen, tmp_path, monkeypatch, capsys):
    for package in ("torchao", "gemlite", "gemlite.helper"):
        monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "rows.jsonl"
    # tiny: 160 inputs of down are no multiple of 64
    main("tiny", out, names="int8,int4,half", **OPTIONS)
    reasons = {row["variant"]: row["reason"] for row in rows_of(out, "skipped")}
    assert set(reasons) == {"int8", "int4"}
    assert "torchao" in reasons["int8"] and "160 inputs" in reasons["int4"]
    assert [row["variant"] for row in rows_of(out, "decode")] == ["half"]
    monkeypatch.setattr(rivals, "linears_of", lambda model, rival: {"lm_head": model.lm_head})
    main("tiny", out, names="gemlite,fp8", **OPTIONS)
    assert all("Error: import of " in row["reason"] for row in rows_of(out, "skipped"))
    assert len(rows_of(out, "skipped")) == 2


@AS_REWRITTEN
def test_a_rival_with_wrong_logits_has_no_time(seen, tmp_path, monkeypatch):
    dense = build("tiny", device=CPU, dtype="float32")
    monkeypatch.setattr(Variant, "compiled", lambda self, model: dense.forward)
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="half", **OPTIONS)
    assert rows_of(out, "decode") == []
    (row,) = rows_of(out, "skipped")
    assert "wrong result" in row["reason"] and not row["gate"]["passed"]


def test_the_model_itself_is_unchanged(seen):
    model = build("tiny", device=CPU, dtype="float32")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with on_model(Variant("half", "half", None), model, layout_of(model), seed=0) as prepared:
        assert prepared.model is not model and prepared.plan is None
        assert torch.equal(prepared.model.lm_head.weight, 0.5 * before["lm_head.weight"])
        assert len(prepared.quantised) == len(seen["half"]) == 7 * 2 + 1
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_options_are_restored_after_an_error(monkeypatch):
    def failing(model, names):
        inductor.coordinate_descent_tuning = True
        raise RuntimeError("no kernel")

    model = build("tiny", device=CPU, dtype="float32")
    assert not inductor.coordinate_descent_tuning
    with pytest.raises(RuntimeError, match="no kernel"), quantised(model, Rival(failing, 1.0)):
        pass
    assert not inductor.coordinate_descent_tuning


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        linears_of(nn.Sequential(nn.Embedding(4, 4)), Rival(lambda model, names: None, 1.0))


def test_rivals_are_the_last_variants():
    found = variants("int4,rana,eager,fp8", [0.5], [], mode="default", configs=[PlanConfig()], prefill="masked")
    assert [variant.label for variant in found] == ["eager", "rana 0.5", "int4", "fp8"]


def test_only_a_reference_that_varies_has_a_wider_bound():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4096, generator=generator)

    def varying(size):
        return exact + size * torch.randn(4096, generator=generator)

    limit = 0.01
    still = record_expected(lambda: exact, nn.Identity(), None, dtype=torch.float32)
    assert still.noise == 0
    assert check_logits(lambda: varying(0.009), None, still, limit=limit).passed
    assert not check_logits(lambda: varying(0.011), None, still, limit=limit).passed
    noisy = record_expected(lambda: varying(0.02), nn.Identity(), None, dtype=torch.float32)
    result = check_logits(lambda: varying(0.02), None, noisy, limit=limit)
    assert result.passed and result.masked_bound == pytest.approx(2 * result.noise)
    assert not check_logits(lambda: varying(0.1), None, noisy, limit=limit).passed
    # however much the reference varies, an unrelated result is refused
    wild = record_expected(lambda: varying(1.0), nn.Identity(), None, dtype=torch.float32)
    assert not check_logits(lambda: varying(1.0), None, wild, limit=limit).passed


def test_the_operands_of_tinygemm_mean_what_its_kernel_computes():
    """By the CPU's kernel, whose scales and zeros have the same meaning; only the packing differs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 192, generator=generator).bfloat16()
    x = torch.randn(5, 192, generator=generator).bfloat16()
    codes, scales_and_zeros, meant = tinygemm_operands(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)
    got = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scales_and_zeros)
    exact = x.double() @ meant.double().t()
    assert (got.double() - exact).norm() <= torch.finfo(torch.bfloat16).eps / 2 * exact.norm()
    # 15 steps over the range of 64 normal values, about 4.7: an error of 4.7 / 15 / sqrt(12)
    assert 0.05 < (meant.double() - weight.double()).norm() / weight.double().norm() < 0.12
    assert set(rounded(weight).codes.unique().tolist()) == set(range(16))


def wide():
    config = SHAPES["tiny"]()
    # tinygemm pads to multiples of 1024 inputs; few layers have a bound that is near their rounding
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 2048, 8
    return config


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of the packages compared with
@pytest.mark.parametrize(
    ("name", "package"), [("int8", "torchao"), ("fp8", "torchao"), ("int4", "torchao"), ("gemlite", "gemlite")]
)
def test_rivals_on_a_gpu(name, package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setitem(SHAPES, "wide", wide)
    out = tmp_path / "rows.jsonl"
    main("wide", out, names=f"reduce-overhead,{name}", **OPTIONS | {"device": "cuda", "dtype": "bfloat16"})
    assert rows_of(out, "skipped") == []
    assert [row["variant"] for row in rows_of(out, "decode")] == ["reduce-overhead", name]
