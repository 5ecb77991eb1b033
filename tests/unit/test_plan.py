"""Plans: round trip, digest, atomic saving, and errors for all kinds of damaged files."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import pickle
import threading
from dataclasses import replace

import pytest
import torch

import rana_fx
from rana_fx import plan_io as planfile
from rana_fx.errors import PlanFileError, PlanMismatch, PlanVersion, PlanWriteError
from rana_fx.runtime.attachment import attached
from tests.support.architectures import build as build_model
from tests.support.architectures import ids


@functools.cache
def _made(budget, recipe, name, seed):
    with torch.random.fork_rng():
        model, _ = build_model(name, 1)
        torch.manual_seed(seed)
        batches = [ids() for _ in range(4)]
        plan = rana_fx.adapt(model, batches, budget=budget, recipe=recipe, progress=False)
    return model, plan


def make(budget=0.7, recipe="paper", name="plain_llama", seed=0):
    """(a model of its own with a plan attached, the plan), calibrated once."""
    model, plan = _made(budget, recipe, name, seed)
    return copy.deepcopy(model), plan


@pytest.fixture(scope="module")
def model_and_plan():
    return make()


@pytest.fixture
def plan(model_and_plan):
    return model_and_plan[1]


def test_round_trip_is_bit_identical(plan, tmp_path):
    plan.save(tmp_path / "p")
    loaded = rana_fx.load_plan(tmp_path / "p")
    assert loaded.to_dict() == plan.to_dict()
    assert loaded.digest() == plan.digest()
    for ours, theirs in zip(plan.adapters, loaded.adapters, strict=True):
        assert ours.tensors().keys() == theirs.tensors().keys()
        assert all(torch.equal(value, theirs.tensors()[key]) for key, value in ours.tensors().items())
    assert "rank" in plan.summary()
    assert plan.digest()[:12] in plan.summary()


def test_digest_depends_on_factors(plan):
    first = plan.adapters[0]
    changed = replace(plan, adapters=(replace(first, tau=first.tau * 1.01), *plan.adapters[1:]))
    assert changed.digest() != plan.digest()


def test_saving_again_leaves_one_plan(plan, tmp_path):
    other = make(budget=0.8)[1]
    plan.save(tmp_path)
    other.save(tmp_path)
    assert rana_fx.load_plan(tmp_path).digest() == other.digest()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("failing", ["first", "second"])
def test_full_disk_keeps_the_old_plan(plan, tmp_path, monkeypatch, failing):
    plan.save(tmp_path)
    other = make(budget=0.8)[1]
    calls = []
    fsync = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == (1 if failing == "first" else 2):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanWriteError, match="No space left on device"):
        other.save(tmp_path)
    assert rana_fx.load_plan(tmp_path).digest() == plan.digest()
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_save_keeps_the_old_plan(plan, tmp_path, monkeypatch):
    plan.save(tmp_path)
    other = make(budget=0.8)[1]

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        other.save(tmp_path)
    assert rana_fx.load_plan(tmp_path).digest() == plan.digest()


def damage_truncate(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def damage_tensor(folder):
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def edit(folder, change):
    path = folder / planfile.HEADER
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


DAMAGE = {
    "truncated tensors": (damage_truncate, PlanFileError, "truncated or was changed"),
    "changed tensors": (damage_tensor, PlanFileError, "truncated or was changed"),
    "missing tensors": (lambda f: next(f.glob("*.safetensors")).unlink(), PlanFileError, "No such file"),
    "truncated json": (lambda f: (f / "plan.json").write_text('{"format"'), PlanFileError, "not JSON"),
    "not a plan": (lambda f: (f / "plan.json").write_text("[1]"), PlanFileError, "no format number"),
    "no header": (lambda f: (f / "plan.json").unlink(), PlanFileError, "there is no plan.json"),
    "changed budget": (lambda f: edit(f, lambda h: h["plan"].update(budget=0.1)), PlanFileError, "does not match its digest"),
    "wrong type": (lambda f: edit(f, lambda h: h["plan"].update(budget="low")), PlanFileError, "budget"),
    "newer format": (lambda f: edit(f, lambda h: h.update(format=99)), PlanVersion, "Upgrade rana_fx"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_plans_are_refused(plan, tmp_path, kind):
    plan.save(tmp_path)
    act, error, text = DAMAGE[kind]
    act(tmp_path)
    with pytest.raises(error, match=text):
        rana_fx.load_plan(tmp_path)


def test_attach_checks_the_weights(plan):
    model, _ = build_model("plain_llama", 1)
    rana_fx.attach(model, plan)
    assert attached(model).plan is plan
    assert rana_fx.detach(model) is plan
    assert attached(model) is None
    assert not hasattr(model, "rana_fx")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(PlanMismatch, match=r"up_proj: got other weights"):
        rana_fx.attach(model, plan)


def test_attach_refuses_other_models(plan):
    with pytest.raises(PlanMismatch, match="no such weight"):
        rana_fx.attach(build_model("gpt2", 1)[0], plan)
    with pytest.raises(PlanMismatch, match=r"dtype bfloat16, expected dtype float32"):
        rana_fx.attach(build_model("plain_llama", 1)[0].bfloat16(), plan)


def test_thresholds_stay_fp32_when_the_model_is_halved(model_and_plan):
    model, plan = make()
    before = model.rana_fx.a0_tau.clone()
    model.half()
    assert model.rana_fx.a0_tau.dtype == torch.float32
    assert torch.equal(model.rana_fx.a0_tau, before)
    assert model.rana_fx.a0_router.dtype == torch.float16


def logits(model):
    torch.compiler.reset()
    torch.manual_seed(5)
    batch = ids()
    with torch.no_grad():
        return torch.compile(model, backend=rana_fx.backend)(**batch).logits


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_deep_copy_is_adapted_and_its_own():
    model, plan = make()
    twin = copy.deepcopy(copy.deepcopy(model))
    expected = logits(model)
    assert attached(twin).factors is twin.rana_fx
    assert attached(twin) is not attached(model)
    assert rana_fx.detach(model) is plan
    assert torch.equal(logits(twin), expected)
    assert attached(copy.deepcopy(twin.model.layers[0])) is None


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_pickled_model_is_to_be_attached_to_again():
    model, plan = make()
    expected = logits(model)
    other = pickle.loads(pickle.dumps(model))
    assert attached(other) is None
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="has no plan attached"):
        logits(other)
    rana_fx.attach(other, plan)
    assert torch.equal(logits(other), expected)


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_state_dict_holds_the_factors():
    model, _ = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    with torch.no_grad():
        model.rana_fx.a0_router.zero_()
    model.load_state_dict(state)
    assert attached(model) is not None
    assert torch.equal(logits(model), expected)
    rana_fx.detach(model)
    assert not any("rana_fx" in key for key in model.state_dict())


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_checkpoint_of_an_adapted_model_loads(tmp_path):
    model, plan = make(name="llama")
    with pytest.warns(rana_fx.RanaWarning, match="load it as the dense model"):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    rana_fx.attach(loaded, plan)
    assert torch.equal(logits(loaded), logits(model))


def test_paths_that_are_no_folders(plan, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PlanWriteError, match=r"file: File exists"):
        plan.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(PlanWriteError, match="null (byte|character)"):
        plan.save("a\0b")
    with pytest.raises(PlanFileError, match="it is a file, not a folder"):
        rana_fx.load_plan(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    plan.save("relative/path")
    assert rana_fx.load_plan("relative/path").digest() == plan.digest()


def test_thousands_of_adapters(plan, tmp_path):
    adapters, sites = [], []
    for index in range(3000):
        adapter = plan.adapters[index % len(plan.adapters)]
        names = {site.name: f"{index}.{site.name}" for site in plan.sites if site.name in adapter.sites}
        sites += [replace(site, name=names[site.name]) for site in plan.sites if site.name in names]
        own = {"name": f"{index}.{adapter.name}", "sites": tuple(names[site] for site in adapter.sites)}
        adapters.append(replace(adapter, **own, **{k: v.clone() for k, v in adapter.tensors().items()}))
    many = replace(plan, sites=tuple(sites), adapters=tuple(adapters))
    many.save(tmp_path)
    assert rana_fx.load_plan(tmp_path).digest() == many.digest()


def test_a_second_save_waits_for_the_first(plan, tmp_path, monkeypatch):
    """Without the lock, the clean-up of the first save removes tensors of the second, whose header is not yet written."""
    other = make(budget=0.8)[1]
    replaced = planfile._replace
    threads = []

    def slow(path, content):
        replaced(path, content)
        if path.name == planfile.HEADER and not threads:
            threads.append(threading.Thread(target=other.save, args=(tmp_path,)))
            threads[0].start()
            threads[0].join(0.5)  # the second save waits while the first is in progress
            assert threads[0].is_alive()

    monkeypatch.setattr(planfile, "_replace", slow)
    plan.save(tmp_path)
    threads[0].join()
    assert rana_fx.load_plan(tmp_path).digest() == other.digest()


def test_loading_while_another_process_saves(plan, tmp_path, monkeypatch):
    """If the tensors of a header are already removed, the new header is read."""
    plan.save(tmp_path)
    other = make(budget=0.8)[1]
    read = planfile._header

    def late(folder):
        monkeypatch.setattr(planfile, "_header", read)
        content = read(folder)
        other.save(folder)
        return content

    monkeypatch.setattr(planfile, "_header", late)
    assert rana_fx.load_plan(tmp_path).digest() == other.digest()


def test_leftovers_of_a_killed_save_are_removed(plan, tmp_path):
    plan.save(tmp_path)
    (tmp_path / ".plan-0123.safetensors.77.tmp").write_bytes(b"half")
    plan.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
