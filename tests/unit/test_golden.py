"""Golden files (tests/golden/make.py): files of an earlier version are read and give the same values, names and keys."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch

import rana_fx
from rana_fx.errors import PlanFileError, PlanVersion
from rana_fx.plan import weight_digest
from rana_fx.training import add_lora, load_lora, trained_plan
from tests.golden import check, interface
from tests.golden.model import FOLDER, load

EXPECTED = json.loads((FOLDER / "expected.json").read_text())
INTERFACE = json.loads((FOLDER / "interface.json").read_text())
OUTPUTS = safetensors.torch.load_file(FOLDER / "outputs.safetensors")
PLANS = FOLDER / "plans"


def same_logits(model, name, dtype=torch.float32):
    got, right = check.logits(model), OUTPUTS[name]
    assert got.shape == right.shape
    assert check.distance(got, right) < check.tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_dense_model_is_the_one_of_then(dtype):
    same_logits(load(dtype), f"dense {dtype}", dtype)


def test_digests_of_weights():
    got = {name: weight_digest(value) for name, value in check.weights_to_digest().items()}
    assert got == EXPECTED["weights"]
    assert len(set(got.values())) == len(got)


def fitting(columns, scales):
    """Group lengths that give a row that many scales."""
    return [length for length in (64, 128) if -(-columns // length) == scales]


def test_every_kind_storage_and_format_is_there():
    plans = {name: rana_fx.load_plan(PLANS / name) for name in EXPECTED["plans"]}
    assert {path.name for path in PLANS.iterdir()} == set(plans)
    assert {facts["format"] for facts in EXPECTED["plans"].values()} == {2, 3}
    adapters = [adapter for plan in plans.values() for adapter in plan.adapters]
    assert {adapter.kind for adapter in adapters} == {"rank", "static", "neuron", "gated", "stored"}
    floating = {torch.float32, torch.float16, torch.bfloat16}
    stored = {torch.int8, torch.uint8}
    assert {a.weight.dtype for a in adapters if a.weight is not None} == floating | stored
    assert {a.router.dtype for a in adapters if a.router is not None} == floating | stored
    scales = [a.weight_scale for a in adapters if a.weight_scale is not None]
    assert {scale.dtype for scale in scales} == {torch.float32, torch.bfloat16}
    in_4_bits = [a for a in adapters if a.weight is not None and a.weight.dtype == torch.uint8]
    groups = [fitting(2 * a.weight.shape[1], a.weight_scale.shape[1]) for a in in_4_bits]
    assert [64] in groups and [128] in groups
    for key in ("router_tau", "shift", "exact_tau", "bias", "gate", "error"):
        assert {getattr(a, key) is None for a in adapters} == {False, True}, key
    for kind in ("rank", "static"):
        assert any(a.kind == kind and a.router_tau is not None for a in adapters)
        assert any(a.kind == kind and a.exact_tau is not None for a in adapters)
    assert {len(a.tau) == 1 for a in adapters if a.kind == "gated"} == {False, True}
    assert {a.weight is None for a in adapters if a.kind == "neuron"} == {False, True}


@pytest.mark.parametrize("name", EXPECTED["plans"])
def test_plans_are_read_and_reproduced(name, tmp_path):
    facts, header = EXPECTED["plans"][name], json.loads((PLANS / name / "plan.json").read_text())
    plan = rana_fx.load_plan(PLANS / name)
    assert plan.digest() == facts["digest"] == header["digest"]
    for metric, cost in facts["expected"].items():
        assert plan.expected_budget(metric) == pytest.approx(cost, rel=1e-12)
    # saved again it is the same, bit by bit
    plan.save(tmp_path)
    again = json.loads((tmp_path / "plan.json").read_text())
    assert (again["plan"], again["digest"]) == (header["plan"], header["digest"])
    before, after = (safetensors.torch.load_file(next(folder.glob("*.safetensors"))) for folder in (PLANS / name, tmp_path))
    assert before.keys() == after.keys()
    assert all(value.dtype == after[key].dtype and torch.equal(value, after[key]) for key, value in before.items())
    same_logits(check.adapted(name), f"plan {name}", getattr(torch, plan.sites[0].dtype))


def test_a_newer_format_is_refused(tmp_path):
    shutil.copytree(PLANS / "gated", tmp_path, dirs_exist_ok=True)
    header = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(PlanVersion, match=r"plan format 99 .*reads format \d+\. Upgrade") as caught:
        rana_fx.load_plan(tmp_path)
    assert caught.value.facts["got"] == 99 and 3 <= caught.value.facts["expected"] < 99


@pytest.mark.parametrize("missing", ["plan.json", "*.safetensors"])
def test_half_a_plan_is_refused(tmp_path, missing):
    shutil.copytree(PLANS / "gated", tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob(missing)).unlink()
    with pytest.raises(PlanFileError, match="is not a readable plan"):
        rana_fx.load_plan(tmp_path)


def test_lora_is_read_and_merged(tmp_path):
    pytest.importorskip("peft")
    model = check.adapted("rank")
    added = load_lora(model, FOLDER / "lora")
    assert sorted(added) == EXPECTED["lora"]["parameters"]
    same_logits(model, "lora")
    plan = trained_plan(model)
    assert plan.digest() == EXPECTED["lora"]["merged"]
    named = dict(model.named_parameters())
    assert {name: weight_digest(named[name]) for name in EXPECTED["lora"]["weights"]} == EXPECTED["lora"]["weights"]
    rana_fx.attach(model, plan)
    same_logits(model, "lora merged")


def test_lora_is_saved_under_the_same_names(tmp_path):
    pytest.importorskip("peft")
    from rana_fx.training import save_lora

    model = check.adapted("rank")
    load_lora(model, FOLDER / "lora")
    save_lora(model, tmp_path)
    before, after = (safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in (FOLDER / "lora", tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    fresh = check.adapted("rank")
    assert sorted(add_lora(fresh, check.lora_config())) == EXPECTED["lora"]["parameters"]


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    pytest.importorskip("peft")
    shutil.copytree(FOLDER / "checkpoint", tmp_path, dirs_exist_ok=True)
    got, right = check.trained(tmp_path, resume=True), EXPECTED["training"]["losses"]
    assert got[:2] == right[:2]
    # a cross-entropy moves by at most twice as much as any logit, and a logit by at most the distance of all of them
    limit = 2 * check.tolerance(torch.float32) * float(OUTPUTS["plan rank"].norm())
    assert got == pytest.approx(right, abs=limit)
    assert abs(right[3] - right[1]) > 10 * limit


@pytest.mark.parametrize("name", ["dense", *check.EXPLAINED])
def test_rows_of_explain(name):
    got = json.loads(json.dumps(check.explained(load() if name == "dense" else check.adapted(name))))
    right = json.loads((FOLDER / "explain.json").read_text())[name]
    assert len(got["rows"]) == len(right["rows"])
    for found, expected in [(got, right), *zip(got["rows"], right["rows"], strict=True)]:
        assert {key: found[key] for key in expected if key != "rows"} == {
            key: pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
            for key, value in expected.items()
            if key != "rows"
        }


def test_recipes_and_metrics():
    for kind, names in INTERFACE["choices"].items():
        assert set(names.split(", ")) <= set(interface.choices()[kind].split(", "))


def test_public_names_and_their_arguments():
    now = interface.public()
    for module, names in INTERFACE["public"].items():
        for name, arguments in names.items():
            assert name in now[module], f"{module}.{name} is gone"
            if arguments is not None:
                lost = set(arguments.split()) - set((now[module][name] or "").split())
                assert not lost, f"{module}.{name} no longer takes {lost}"


@pytest.mark.parametrize("command", INTERFACE["options"])
def test_options_and_their_defaults(command):
    before, now = INTERFACE["options"][command], interface.options()[command]
    assert set(before) <= set(now), f"lost: {set(before) - set(now)}"
    assert {name: now[name] for name in before} == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk, and its plan by ``rana-fx adapt``."""
    folder = tmp_path_factory.mktemp("golden")
    interface.prepare(folder)
    return folder, interface.record(folder, "adapt")


@pytest.mark.parametrize("name", INTERFACE["json"])
def test_json_files_keep_their_keys(name, folder, tmp_path, monkeypatch):
    if name.startswith("tasks"):
        pytest.importorskip("lm_eval")
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    if name.startswith("finetune"):
        pytest.importorskip("peft")
    now = folder[1] if name == "adapt" else interface.record(folder[0], name)
    for path, given in INTERFACE["json"][name].items():
        assert path in now, f"{name}: {path} is gone"
        before, after = set(given.split()), set(now[path].split())
        # a null of one version may have any type in the other
        if before != {"NoneType"}:
            assert before & after and after - before <= {"NoneType"}, f"{name}: {path} was {given}, is {now[path]}"
