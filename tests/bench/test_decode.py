"""bench.decode: random plans meet their target cost, rows have the facts of the protocol, wrong logits give no time."""

from __future__ import annotations

import json

import pytest
import torch

import rana_fx
from bench.common.models import SHAPES, build, layers_of
from bench.speed import decoding
from bench.speed.decode import main
from bench.speed.decoding import Decoder
from bench.speed.latency import Variant
from bench.speed.random_plan import PlanConfig, attach_unchecked, layout_of, plan_configs, random_plan, ranks_for
from bench.speed.variants import on_model, reference, variants
from bench.speed.verify import bound, check_logits, fixed_masks, record_expected, relative_rmse
from rana_fx.errors import InvalidOption, UnknownChoice
from rana_fx.plan import load_plan
from rana_fx.runtime.attachment import attached, detach
from tests.support.architectures import build as build_architecture

CPU = torch.device("cpu")
# the subject is the protocol or the comparison of logits; other tests of this file use Inductor
AS_REWRITTEN = pytest.mark.usefixtures("graphs_as_rewritten")


TWO_LAYERS = SHAPES["tiny"]


def one_layer():
    config = TWO_LAYERS()
    config.num_hidden_layers = 1
    return config


@pytest.fixture(scope="module", autouse=True)
def _one_layer():
    """And a small buffer, whose copies are timed for the bandwidth: copying a large one takes a second of each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", one_layer)
        patch.setitem(decoding._COPY_BYTES, "cpu", 2**22)
        yield


@pytest.fixture(scope="module")
def tiny():
    model = build("tiny", device=CPU, dtype="float32")
    return model, layout_of(model)


def rows_of(path, kind):
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


# all ranks are at their bound at the first, none at the second; those of budgets in between: test_ranks_stay_below_the_cap below
@pytest.mark.parametrize("budget", [0.8, 0.4])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_random_plan_has_the_target_cost(tiny, budget, stacked):
    model, layout = tiny
    variant = Variant("rana", "rana", "default", budget, config=PlanConfig(stacked=stacked))
    with on_model(variant, model, layout, seed=1) as prepared, torch.no_grad():
        reference(variant, prepared, Decoder(model, batch=4, room=128), seed=0)
        assert attached(model).plan.digest() == prepared.plan.digest()
        assert prepared.plan.expected_budget("bytes") == pytest.approx(budget, abs=1e-6)
        assert prepared.measured.budget_bytes == pytest.approx(budget, abs=0.02)
        for adapter in prepared.plan.adapters:
            assert prepared.measured.density[adapter.name] == pytest.approx(adapter.density, abs=0.1), adapter.name
    # per layer: qkv, o, down, and gate and up in one adapter or in two
    assert len(prepared.plan.adapters) == (4 if stacked else 5) * layers_of(model)
    assert attached(model) is None


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma"])
def test_other_architectures_have_random_plans(kind):
    model, _ = build_architecture(kind, 2)
    plan = random_plan(model, layout_of(model), 0.5)
    assert plan.expected_budget() == pytest.approx(0.5, abs=1e-6)
    assert {site for adapter in plan.adapters for site in adapter.sites} == {s.name for s in plan.sites if s.counted}


@pytest.mark.parametrize("kind", ["rank", "neuron", "apart"])
def test_a_random_plan_counts_the_head_where_asked(kind):
    model, _ = build_architecture("gemma", 1)
    layout = layout_of(model, "all")
    plan = random_plan(model, layout, 0.5, config=PlanConfig(kind=kind))
    assert plan.scope == "all" and plan.expected_budget() == pytest.approx(0.5, abs=1e-6)
    assert {site for adapter in plan.adapters for site in adapter.sites} == set(layout.sites)
    (head,) = (site.name for site in plan.sites if site.role == "head")
    adapter = plan.adapter_of(head)
    assert adapter.sites == (head,) and adapter.kind == "neuron" and adapter.density == pytest.approx(0.5)


def test_an_unknown_scope(tmp_path):
    with pytest.raises(UnknownChoice, match=r"scope='head' is not known. Pick one of: blocks, all"):
        main("tiny", tmp_path / "rows.jsonl", scope="head")


@pytest.mark.parametrize(("out", "width"), [(12288, 4096), (22016, 4096), (6144, 4096), (96, 64)])
@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.6, 0.8, 1.0])
def test_ranks_stay_below_the_cap_and_cost_the_fraction(out, width, fraction):
    ranks, kept = ranks_for(out, width, fraction, 0.5)
    assert 0 < kept <= ranks <= out * width / (out + width)
    assert ranks * width + kept * out == pytest.approx(fraction * out * width, rel=0.02)


@pytest.mark.parametrize(("router", "factor", "budget"), [(8, 16, 0.5), (4, 8, 0.2), (8, 4, 0.12)])
@AS_REWRITTEN
def test_a_random_plan_in_few_bits_has_the_target_cost(tiny, router, factor, budget):
    """Compiled code of every storage: tests/integration/test_storage.py."""
    model, layout = tiny
    variant = Variant("rana", "rana", "default", budget, config=PlanConfig(router_bits=router, factor_bits=factor))
    decoder = Decoder(model, batch=1, room=128)
    limit = bound(model.dtype, layers_of(model), 160)
    with on_model(variant, model, layout, seed=1) as prepared, torch.no_grad():
        script, expected = reference(variant, prepared, decoder, seed=0)
        plan = prepared.plan
        assert plan.expected_budget("bytes") == pytest.approx(budget, abs=1e-6)
        assert prepared.measured.budget_bytes == pytest.approx(budget, abs=0.02)
        bits = {key: {a.bits().get(key) for a in plan.adapters if a.kind == "rank"} for key in ("router", "weight")}
        assert bits == {"router": {32 if router == 16 else router}, "weight": {32 if factor == 16 else factor}}
        forward = variant.compiled(model)
        check = check_logits(lambda: decoder.logits(forward, script), plan, expected, limit=limit)
        assert check.passed, check
    assert attached(model) is None


@pytest.mark.parametrize(("label", "per_layer"), [("neuron", 4), ("neuron:16/8", 4), ("apart", 7)])
@AS_REWRITTEN
def test_a_random_plan_of_masks_has_no_router(tiny, label, per_layer):
    model, layout = tiny
    (config,) = plan_configs(label, density=0.5, stacked=True)
    assert config.label == label
    variant, decoder = Variant("rana", "rana", "default", 0.24, config=config), Decoder(model, batch=1, room=128)
    with on_model(variant, model, layout, seed=1) as prepared, torch.no_grad():
        script, expected = reference(variant, prepared, decoder, seed=0)
        plan = prepared.plan
        assert {adapter.kind for adapter in plan.adapters} == {"neuron"}
        assert len(plan.adapters) == per_layer * layers_of(model)
        assert prepared.measured.budget_bytes == pytest.approx(0.24, abs=0.02)
        limit = bound(model.dtype, layers_of(model), 160)
        check = check_logits(lambda: decoder.logits(variant.compiled(model), script), plan, expected, limit=limit)
        assert check.passed, check


def test_configs_by_label():
    found = plan_configs("rank, rank:8/16,neuron:16/4", density=0.4, stacked=False)
    assert [config.label for config in found] == ["rank", "rank:8/16", "neuron:16/4"]
    assert {(config.density, config.stacked) for config in found} == {(0.4, False)}
    for wrong, reason in (("neurons", "kind='neurons'"), ("rank:8", "router bits/factor bits"), ("rank:8/5", "factor_bits=5")):
        with pytest.raises(InvalidOption, match=reason):
            plan_configs(wrong, density=0.5, stacked=True)


def test_the_factors_of_a_random_plan_exist_once(tiny):
    model, layout = tiny
    plan = attach_unchecked(model, random_plan(model, layout, 0.12, config=PlanConfig(router_bits=8, factor_bits=4)))
    live = dict(model.rana_fx.state_dict())
    for index, adapter in enumerate(plan.adapters):
        for key, value in adapter.tensors().items():
            assert live[f"a{index}_{key}"].data_ptr() == value.data_ptr()
    detach(model)


def test_unknown_bits_and_budgets_above_full_rank_are_refused(tiny):
    for name in ("router_bits", "factor_bits"):
        with pytest.raises(InvalidOption, match=f"{name}=3"):
            PlanConfig(**{name: 3})
    model, layout = tiny
    with pytest.raises(InvalidOption, match="in so few bits"):
        random_plan(model, layout, 0.5, config=PlanConfig(router_bits=4, factor_bits=4))


@pytest.mark.parametrize("router", [16, 8, 4])
@pytest.mark.parametrize("factor", [16, 8, 4])
def test_ranks_in_few_bits_cost_the_fraction(router, factor):
    out, width, fraction = 12288, 4096, 0.25
    ranks, kept = ranks_for(out, width, fraction, 0.5, router_bits=router, factor_bits=factor)
    assert 0 < kept <= ranks <= width
    # bytes counted by hand: scales are bf16, one per row in 8 bits, one per 64 columns in 4
    router_row = {16: 2 * width, 8: width + 2, 4: width // 2 + width // 64 * 2}[router]
    factor_row = {16: 2 * out, 8: out + 2, 4: out // 2 + out // 64 * 2}[factor]
    assert ranks * router_row + kept * factor_row == pytest.approx(fraction * 2 * out * width, rel=1e-9)


OPTIONS = {"sequences": 2, "longest": 12, "new_tokens": 5, "dtype": "float32", "device": "cpu"}


@AS_REWRITTEN
def test_rows_have_the_facts_of_the_protocol(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TWO_LAYERS)
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="eager,rana", budgets="0.5", batches="1,2", prefill=0, **OPTIONS)
    (device,) = rows_of(out, "device")
    assert device["copy_gb_per_s"] > 0 and device["weight_gb"] > 0
    assert device["versions"]["torch"] and device["commit"] and "threads" in device
    assert rows_of(out, "skipped") == []
    rows = rows_of(out, "decode")
    assert [(row["variant"], row["batch"]) for row in rows] == [
        (name, batch) for name in ("eager", "rana 0.5") for batch in (1, 2)
    ]
    for row in rows:
        assert row["gate"]["passed"] and row["sequences"] == 2 and len(row["contexts"]) == 2
        assert 0 < row["ms_per_token"]["p20"] <= row["ms_per_token"]["p50"] <= row["ms_per_token"]["p80"]
        assert row["tokens_per_s"] > 0 and row["compile_seconds"] > 0 and row["peak_gb"] > 0
        assert (row["dense_ratio"] is None) == (row["variant"] == "eager")
        if row["variant_kind"] == "rana":
            assert row["expected_budget"]["bytes"] == pytest.approx(0.5, abs=1e-6)
            # thresholds and measurement use 64 tokens each
            assert row["measured_budget"]["bytes"] == pytest.approx(0.5, abs=0.04)
            assert row["gate"]["fixed_error"] <= row["gate"]["fixed_bound"]
            assert row["adapters"]["rank of attention_in"]["count"] == 2
    # a plan reads fewer bytes than the dense model; the union of rows that a batch reads is not measured
    rates = {(row["variant"], row["batch"]): row["weight_gb_per_s"] for row in rows}
    assert rates["rana 0.5", 2] is None and rates["rana 0.5", 1] > 0
    assert "rana 0.5" in capsys.readouterr().out


@AS_REWRITTEN
def test_prefill_and_kernels_have_rows_of_their_own(tmp_path):
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="reduce-overhead", batches="1", prefill=16, profile=True, **OPTIONS)
    (prefill,), (kernels,) = rows_of(out, "prefill"), rows_of(out, "kernels")
    assert prefill["prefill_ms"] > 0 and prefill["prefill_tokens"] == 16
    assert sum(item["share"] for item in kernels["kernels"]) == pytest.approx(1)
    assert kernels["kernels"][0]["us"] >= kernels["kernels"][-1]["us"] > 0


@AS_REWRITTEN
def test_a_batch_that_leaves_adapters_out_is_compared_with_that(tmp_path):
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="rana", budgets="0.5", batches="1,9", prefill=0, prefill_mode="dense", **OPTIONS)
    assert rows_of(out, "skipped") == []
    assert [(row["batch"], row["gate"]["passed"]) for row in rows_of(out, "decode")] == [(1, True), (9, True)]


@pytest.mark.gpu
def test_the_protocol_with_cuda_graphs(tmp_path):
    out = tmp_path / "rows.jsonl"
    options = OPTIONS | {"device": "cuda", "dtype": "bfloat16"}
    main("tiny", out, names="reduce-overhead,rana", budgets="0.5", batches="1,4", prefill=0, profile=True, **options)
    assert rows_of(out, "skipped") == []
    assert [row["gate"]["passed"] for row in rows_of(out, "decode")] == [True] * 4
    assert all(row["kernels"] for row in rows_of(out, "kernels"))


def test_a_run_without_time_skips_all_variants(tmp_path):
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="eager,rana", budgets="0.5", seconds=0.0, dtype="float32", device="cpu", prefill=0)
    assert rows_of(out, "decode") == []
    assert [row["reason"] for row in rows_of(out, "skipped")] == ["no time left"] * 2


def test_a_wrong_result_has_no_time(tmp_path, monkeypatch, capsys):
    # the dense model in place of the plan: fast, finite and wrong
    monkeypatch.setattr(Variant, "compiled", lambda self, model: model.forward)
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="rana", budgets="0.5", sequences=1, new_tokens=4, longest=4, dtype="float32", device="cpu", prefill=0)
    assert rows_of(out, "decode") == []
    (row,) = rows_of(out, "skipped")
    assert "wrong result" in row["reason"] and not row["gate"]["passed"]
    assert "tokens/s," not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_error_in_one_factor_is_detected(dtype, request):
    if dtype == "float32":
        request.getfixturevalue("graphs_as_rewritten")
    model = build("tiny", device=CPU, dtype=dtype)
    layout, variant = layout_of(model), Variant("rana", "rana", "default", 0.5)
    decoder = Decoder(model, batch=1, room=128)
    limit = bound(model.dtype, layers_of(model), 160)
    with on_model(variant, model, layout, seed=0) as prepared, torch.no_grad():
        script, expected = reference(variant, prepared, decoder, seed=0)
        forward = variant.compiled(model)

        def run():
            return decoder.logits(forward, script)

        run()  # compiles
        good = check_logits(run, prepared.plan, expected, limit=limit)
        assert good.passed, good
        adapter = prepared.plan.adapters[0]
        adapter.weight.mul_(1.5)  # in place: the compiled code reads the same storage
        bad = check_logits(run, prepared.plan, expected, limit=limit)
        assert not bad.passed and bad.fixed_error > limit


@AS_REWRITTEN
def test_a_saved_plan_is_compared_as_it_is(tmp_path):
    model = build("tiny", device=CPU, dtype="float32")
    rana_fx.adapt(model, [{"input_ids": torch.randint(128, (2, 64))}], budget=0.6, recipe="teal", progress=False).save(tmp_path)
    rana_fx.detach(model)
    (variant,) = variants("rana", [], [tmp_path], mode="default", configs=[PlanConfig()], prefill="masked")
    assert variant.label == "rana 0.6"
    decoder, limit = Decoder(model, batch=1, room=128), bound(model.dtype, layers_of(model), 160)
    with on_model(variant, model, layout_of(model), seed=0) as prepared, torch.no_grad():
        taus = [adapter.tau.clone() for adapter in load_plan(tmp_path).adapters]
        script, expected = reference(variant, prepared, decoder, seed=0)
        assert all(torch.equal(adapter.tau, tau) for adapter, tau in zip(prepared.plan.adapters, taus, strict=True))
        forward = variant.compiled(model)
        assert check_logits(lambda: decoder.logits(forward, script), prepared.plan, expected, limit=limit).passed


def test_unknown_variants_are_named():
    with pytest.raises(InvalidOption, match="'fastest'"):
        variants("eager,fastest", [0.5], [], mode="default", configs=[PlanConfig()], prefill="masked")


@AS_REWRITTEN
def test_a_wrong_mask_is_detected(tiny):
    model, layout = tiny
    variant = Variant("rana", "rana", "default", 0.5)
    decoder = Decoder(model, batch=1, room=128)
    with on_model(variant, model, layout, seed=0) as prepared, torch.no_grad():
        script, expected = reference(variant, prepared, decoder, seed=0)
        forward = variant.compiled(model)
        limit = bound(model.dtype, layers_of(model), 160)
        prepared.plan.adapters[0].tau.mul_(1.5)
        bad = check_logits(lambda: decoder.logits(forward, script), prepared.plan, expected, limit=limit)
    # fixed masks replace the thresholds: only the comparison with the plan's own can fail
    assert not bad.passed and bad.fixed_error <= limit and bad.masked_error > bad.masked_bound


def test_fixed_masks_and_noise_are_restored(tiny):
    model, layout = tiny
    variant = Variant("rana", "rana", "default", 0.5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with on_model(variant, model, layout, seed=0) as prepared, torch.no_grad():
        taus = [adapter.tau.fill_(0.25) for adapter in prepared.plan.adapters]
        with fixed_masks(prepared.plan, seed=0):
            assert all(set(tau.tolist()) <= {0.0, float("inf")} for tau in taus)
        assert all((tau == 0.25).all() for tau in taus)
        record_expected(lambda: torch.ones(3), model, prepared.plan, dtype=model.dtype)
        assert all((tau == 0.25).all() for tau in taus)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_value_that_is_not_finite_is_refused():
    expected = torch.ones(4)
    assert relative_rmse(torch.tensor([1.0, float("nan"), 1.0, 1.0]), expected) == float("inf")
    assert relative_rmse(torch.tensor([1.0, float("inf"), 1.0, 1.0]), expected) == float("inf")


def test_dense_with_attention_is_a_dense_rival(tiny, tmp_path):
    model, _ = tiny
    found = variants("rana,dense+attention,eager", [0.5], [], mode="default", configs=[PlanConfig()], prefill="masked")
    assert [(one.label, one.kind, one.mode) for one in found[:2]] == [
        ("eager", "dense", None),
        ("dense+attention", "dense", "reduce-overhead"),
    ]
    decoder = Decoder(model, batch=1, room=24)
    script = decoder.script(16, 3)
    torch.compiler.reset()
    with torch.no_grad():
        expected = decoder.logits(model.forward, script)
        torch.testing.assert_close(decoder.logits(found[1].compiled(model), script), expected, rtol=1e-4, atol=1e-4)
