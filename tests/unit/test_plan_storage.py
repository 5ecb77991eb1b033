"""Quantised plans on disk and on a model: saving, copying and casts keep every storage; invalid files are refused."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import rana_fx
from rana_fx import plan_io as planfile
from rana_fx.adapter import Adapter
from rana_fx.errors import PlanFileError, PlanVersion
from rana_fx.formats import pack
from rana_fx.plan import Plan, SiteRecord
from rana_fx.runtime.attachment import attached
from tests.support.storages import STORAGES, stored_plan


@st.composite
def plans(draw):
    """Up to three adapters over one or two sites each, in any storage the invariants allow."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))

    def stored(rows, columns):
        bits = draw(st.sampled_from([16, 8, 4]))
        matrix = torch.randn(rows, columns)
        if bits == 16:
            return matrix.to(model_dtype), None
        return pack(matrix, bits, draw(st.sampled_from([64, 128])), draw(st.sampled_from([torch.float32, torch.bfloat16])))

    records, adapters = [], []
    for index in range(draw(st.integers(1, 3))):
        width, outs = 2 * draw(st.integers(1, 70)), [draw(st.integers(1, 90)) * 2 for _ in range(draw(st.integers(1, 2)))]
        names = tuple(f"l{index}.{part}" for part in range(len(outs)))
        records += [
            SiteRecord(n, "up", "linear", o, width, False, 1, True, "float32", "") for n, o in zip(names, outs, strict=True)
        ]
        kind = draw(st.sampled_from(["rank", "static", "neuron", "stored"]))
        ranks, fields = width, {}
        if kind in ("rank", "static"):
            ranks = 2 * draw(st.integers(1, 8))
            hybrid = draw(st.booleans())
            fields["router"], fields["router_scale"] = stored(*((width, ranks) if hybrid else (ranks, width)))
            if hybrid:
                fields["router_tau"], fields["router_kept"] = torch.rand(width), draw(st.floats(0, width))
        if kind != "neuron" or draw(st.booleans()):
            fields["weight"], fields["weight_scale"] = stored(ranks, sum(outs))
        if draw(st.booleans()):
            fields["bias"] = torch.randn(sum(outs), dtype=model_dtype)
            fields["shift"] = torch.randn(ranks, dtype=model_dtype) if draw(st.booleans()) else None
        if "router" in fields and len(outs) == 1 and fields.get("shift") is None and draw(st.booleans()):
            fields["exact_tau"], fields["exact_kept"] = torch.randn(outs[0]), draw(st.floats(0, outs[0]))
        adapters.append(
            Adapter(
                name="+".join(names),
                kind=kind,
                sites=names,
                ranks=ranks,
                kept=draw(st.floats(0, ranks)),
                tau=torch.rand(ranks),
                dense_flops=float(width * sum(outs)),
                dense_bytes=4.0 * width * sum(outs),
                **fields,
            )
        )
    return Plan("rana", "bytes", 0.3, 0, 10, "M", {"torch": "2"}, tuple(records), tuple(adapters), ())


@given(plans())
def test_round_trip_is_bit_identical(plan):
    with tempfile.TemporaryDirectory() as folder:
        plan.save(folder)
        loaded = rana_fx.load_plan(folder)
    assert loaded.to_dict() == plan.to_dict()
    assert loaded.digest() == plan.digest()
    for ours, theirs in zip(plan.adapters, loaded.adapters, strict=True):
        assert ours.tensors().keys() == theirs.tensors().keys()
        for key, value in ours.tensors().items():
            assert value.dtype == theirs.tensors()[key].dtype
            assert torch.equal(value, theirs.tensors()[key]), key
        assert (theirs.router_kept, theirs.exact_kept) == (ours.router_kept, ours.exact_kept)
    assert all(adapter.name in plan.summary(all=True) for adapter in plan.adapters)


@given(plans(), st.data())
def test_the_digest_covers_every_tensor(plan, data):
    adapter = data.draw(st.sampled_from(plan.adapters))
    key = data.draw(st.sampled_from(sorted(adapter.tensors())))
    value = adapter.tensors()[key].clone()
    raw = value.view(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1
    changed = tuple(replace(a, **{key: value}) if a is adapter else a for a in plan.adapters)
    assert replace(plan, adapters=changed).digest() != plan.digest()


def test_the_digest_tells_storages_of_the_same_bytes_apart():
    weight, _ = pack(torch.randn(4, 64), 8)
    facts = {"kind": "stored", "sites": ("a",), "ranks": 4, "kept": 4.0, "tau": torch.zeros(4)}
    as_8 = Adapter(name="a", weight=weight, weight_scale=torch.ones(4), **facts)
    as_4 = Adapter(name="a", weight=weight.view(torch.uint8), weight_scale=torch.ones(4, 1), **facts)
    made = [Plan("rana", "bytes", 0.3, 0, 10, "M", {}, (), (adapter,), ()) for adapter in (as_8, as_4)]
    assert made[0].digest() != made[1].digest()


@pytest.fixture(scope="module")
def saved():
    model, _, plan = stored_plan("plain_llama", 1, "hybrid, router 4, factors 4")
    return model, plan


def retensored(folder, change):
    """Replace tensors and the header: only a check of shapes and dtypes detects the change."""
    path = next(folder.glob("*.safetensors"))
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    content = safetensors.torch.save(tensors)
    name = f"plan-{planfile.hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    (folder / name).write_bytes(content)
    edit(folder, lambda header: header.update(tensors=name))


def edit(folder, change):
    header = json.loads((folder / planfile.HEADER).read_text())
    change(header)
    (folder / planfile.HEADER).write_text(json.dumps(header))


def adapter_facts(header):
    return header["plan"]["adapters"][0]


DAMAGE = {
    "no scale": (lambda f: retensored(f, lambda t: t.pop("0.weight_scale")), "q_proj.*: weight_scale is None"),
    "no router scale": (lambda f: retensored(f, lambda t: t.pop("0.router_scale")), "q_proj.*: router_scale is None"),
    "a scale too short": (lambda f: retensored(f, lambda t: t.update({"0.weight_scale": torch.ones(3, 1)})), r"is \(3, 1\)"),
    "another dtype": (lambda f: retensored(f, lambda t: t.update({"0.weight": t["0.weight"].to(torch.int32)})), "torch.int32"),
    "half thresholds": (lambda f: retensored(f, lambda t: t.update({"0.router_tau": t["0.router_tau"].half()})), "float16"),
    "no thresholds": (lambda f: retensored(f, lambda t: t.pop("0.router_tau")), "come together"),
    "no tau": (lambda f: retensored(f, lambda t: t.pop("0.tau")), "0.tau"),
    "fewer ranks": (lambda f: edit(f, lambda h: adapter_facts(h).update(ranks=5, kept=1.0)), r"expected \(5,\) torch.float32"),
    "too many kept": (lambda f: edit(f, lambda h: adapter_facts(h).update(router_kept=1e9)), "router_kept"),
    "fewer sites": (
        lambda f: edit(f, lambda h: adapter_facts(h).update(sites=adapter_facts(h)["sites"][:1])),
        "makes 64 outputs, its linears 32",
    ),
    "another site": (lambda f: edit(f, lambda h: adapter_facts(h).update(sites=["x"])), "replaces x, which is not among"),
    "another width": (
        lambda f: edit(f, lambda h: [site.update(in_features=7) for site in h["plan"]["sites"]]),
        "reads 32 inputs, its linears 7",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_files_that_do_not_fit_are_refused(saved, tmp_path, kind):
    saved[1].save(tmp_path)
    act, text = DAMAGE[kind]
    act(tmp_path)
    with pytest.raises(PlanFileError, match=text):
        rana_fx.load_plan(tmp_path)


def test_plans_of_the_first_format_are_made_again(saved, tmp_path):
    saved[1].save(tmp_path)
    edit(tmp_path, lambda header: header.update(format=1))
    with pytest.raises(PlanVersion, match="Make the plan again with"):
        rana_fx.load_plan(tmp_path)


@pytest.mark.parametrize("storage", ["hybrid, router 4, factors 4", "rank, router 8", "stored, 8"])
def test_stored_numbers_are_buffers_that_only_move(storage):
    model, _, plan = stored_plan("plain_llama", 1, storage)
    rana_fx.attach(model, plan)
    adapter = plan.adapters[0]
    trained = {name for name, _ in model.rana_fx.named_parameters() if name.startswith("a0_")}
    assert trained == {f"a0_{key}" for key in ("router", "weight", "bias", "shift") if _floating(getattr(adapter, key))}
    twin = copy.deepcopy(model)
    for one in (model.half(), twin.bfloat16()):
        assert attached(one) is not None
        for key, value in adapter.tensors().items():
            found = getattr(one.rana_fx, f"a0_{key}")
            fixed = f"a0_{key}" not in trained
            assert found.dtype == (value.dtype if fixed else next(one.parameters()).dtype)
            assert not fixed or torch.equal(found, value)
    state = {key: value for key, value in model.state_dict().items() if key.startswith("rana_fx.a0_")}
    assert {key.removeprefix("rana_fx.a0_") for key in state} == set(adapter.tensors())


def _floating(value):
    return value is not None and value.is_floating_point()


def test_only_the_models_own_weights_are_laid_by_columns():
    for storage in ("neuron, own weight", "stored, 4"):
        model, _, plan = stored_plan("plain_llama", 1, storage)
        rana_fx.attach(model, plan)
        assert attached(model).relaid == ()
    own = replace(
        plan,
        adapters=tuple(
            replace(a, kind="neuron", weight=None, weight_scale=None, bias=None) for a in plan.adapters if len(a.sites) == 1
        ),
    )
    rana_fx.attach(model, own)
    assert len(attached(model).relaid) == len(own.adapters)


@pytest.mark.parametrize("storage", STORAGES)
def test_explain_says_how_it_is_stored(storage):
    model, batch, plan = stored_plan("plain_llama", 1, storage)
    rana_fx.attach(model, plan)
    report = rana_fx.explain(model, batch)
    row = next(row for row in report.rows if row.site.endswith("q_proj"))
    bits = plan.adapters[0].bits()
    if "router" in bits:
        assert f"router {bits['router']} bit" in row.detail
        assert f"factors {bits['weight']} bit" in row.detail
    else:
        assert f"weights {bits['weight']} bit" in row.detail
    assert ("which reads 32.0 of 32 inputs" in row.detail) == ("hybrid" in storage)
    assert row.bytes == pytest.approx(plan.adapters[0].bytes / plan.adapters[0].dense_bytes)
    # attached factors are not reported as quantised layers
    assert not any(row.site.startswith("rana_fx") for row in report.rows)
