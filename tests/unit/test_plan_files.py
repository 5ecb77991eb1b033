"""Plans on disk after failures, damage and changes: saved plans survive, damage is mended, nothing wrong is read."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import math
import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import rana_fx
from rana_fx import plan_io
from rana_fx.adapter import Adapter
from rana_fx.errors import PlanFileError, PlanVersion, PlanWriteError
from rana_fx.plan import Plan, SiteRecord


def record(name, role="up", out=6, width=4):
    return SiteRecord(name, role, "linear", out, width, False, 1, True, "float32", "0" * 16)


def plan_of(seed=0):
    """Every tensor that an adapter may have: two linears behind a masked router, exact outputs, a gate."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    sites = (record("q"), record("k"), record("up"), record("gate"), record("down", "down", 4, 6))
    costs = {"flops": 10.0, "dense_flops": 48.0, "bytes": 40.0, "dense_bytes": 192.0}
    ranks = Adapter(
        name="q+k", kind="rank", sites=("q", "k"), ranks=3, kept=1.5, tau=random(3), router=random(4, 3), weight=random(3, 12),
        bias=random(12), shift=random(3), router_tau=random(4), router_kept=2.0, error=0.1, **costs,
    )  # fmt: skip
    exact = Adapter(
        name="up", kind="static", sites=("up",), ranks=2, kept=2.0, tau=torch.zeros(2), router=random(2, 4), weight=random(2, 6),
        exact_tau=torch.tensor([math.inf, -math.inf, 0.0, 1.0, 2.0, -3.0]), exact_kept=2.5, **costs,
    )  # fmt: skip
    tau = torch.tensor([0.0, math.inf, 0.1, 0.2, 0.3, 0.4])
    gated = Adapter(name="down", kind="gated", sites=("down",), ranks=6, kept=3.0, tau=tau, gate="gate", also=("up",), **costs)
    return Plan("paper", "flops", 0.5, seed, 100, "M", {"torch": "2"}, sites, (ranks, exact, gated), ())


@pytest.fixture
def folder(tmp_path):
    plan_of().save(tmp_path)
    return tmp_path


def whole(folder, plan):
    return rana_fx.load_plan(folder).digest() == plan.digest()


# ---- failures while saving


def test_a_failure_after_the_switch_keeps_the_new_plan(folder, monkeypatch):
    """The old tensors cannot be removed: the new plan is saved all the same, and they go with the next save."""
    old, real = next(folder.glob("*.safetensors")), Path.unlink

    def unlink(self, missing_ok=False):
        if self.name == old.name:
            raise OSError(errno.EIO, "Input/output error")
        real(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        plan_of(1).save(folder)
    assert whole(folder, plan_of(1)) and len(list(folder.iterdir())) == 3
    plan_of(1).save(folder)
    assert whole(folder, plan_of(1)) and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_every_failure_leaves_one_whole_plan(folder, monkeypatch, error, after):
    """A rename that was done and then is said to have failed, and everything after it."""
    calls, real = [], Path.replace

    def rename(self, target):
        if after % 2:
            real(self, target)
        calls.append(target)
        if len(calls) == 1 + after // 2:
            raise error
        return real(self, target) if not after % 2 else target

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", rename)
        with pytest.raises(PlanWriteError if isinstance(error, OSError) else KeyboardInterrupt):
            plan_of(1).save(folder)
    assert whole(folder, plan_of(1) if after == 3 else plan_of())
    plan_of(2).save(folder)
    assert whole(folder, plan_of(2)) and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_saving_over_damaged_tensors_repairs_them(folder, damage):
    path = next(folder.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes({"truncate": content[:-10], "flip": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}[damage])
    with pytest.raises(PlanFileError):
        rana_fx.load_plan(folder)
    plan_of().save(folder)
    assert whole(folder, plan_of())


def test_links_and_modes_of_a_plan_are_kept(tmp_path):
    real = tmp_path / "real"
    plan_of().save(real)
    (tmp_path / "header.json").write_bytes((real / "plan.json").read_bytes())
    (real / "plan.json").unlink()
    (real / "plan.json").symlink_to("../header.json")
    (tmp_path / "header.json").chmod(0o600)
    (tmp_path / "plan").symlink_to("real")
    plan_of(1).save(tmp_path / "plan")
    assert whole(tmp_path / "plan", plan_of(1)) and (tmp_path / "plan").is_symlink() and (real / "plan.json").is_symlink()
    assert (tmp_path / "header.json").stat().st_mode & 0o777 == 0o600


# ---- what is no plan


@pytest.mark.parametrize("what", ["the folder", "plan.json", "the tensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(folder, what, kind):
    path = {"the folder": folder / "other", "plan.json": folder / "plan.json"}.get(what, next(folder.glob("*.safetensors")))
    if what != "the folder":
        path.unlink()
    {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](path)
    caught = []

    def load():
        with pytest.raises(
            PlanFileError, match="not a regular file|Is a directory|a file, not a folder|there is no plan.json"
        ) as e:
            rana_fx.load_plan(path if what == "the folder" else folder)
        caught.append(e)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(30)
    assert caught


HEADERS = {
    "deep": ("[" * 200_000, "it is not JSON"),
    "deep and closed": ('{"format": 2, "plan": ' + "[" * 100_000 + "]" * 100_000 + "}", "it is not JSON"),
    "a huge integer": ('{"format": 2, "plan": ' + "9" * 10_000 + "}", "it is not JSON"),
    "bytes": (b"\xff\xfe\x00", "it is not JSON"),
    "empty": ("", "it is not JSON"),
    "null": ("null", "no format number"),
    "no plan": ('{"format": 2}', "do not belong together"),
    "a null byte": ('{"format": 2, "plan": {}, "tensors": "\\u0000"}', "recipe"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_none(folder, name):
    content, text = HEADERS[name]
    (folder / "plan.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PlanFileError, match=text):
        rana_fx.load_plan(folder)


# ---- plans that were changed, and whose checksums were made to match


def rewrite(folder, change=lambda facts: None, tensors=lambda tensors: None):
    """Change a plan on disk; file name and, where there can be one, digest are those of what it is then."""
    header = json.loads((folder / "plan.json").read_text())
    change(header["plan"])
    path = folder / header["tensors"]
    found = safetensors.torch.load(path.read_bytes())
    tensors(found)
    content = safetensors.torch.save(found)
    header["tensors"] = f"plan-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    (folder / header["tensors"]).write_bytes(content)
    (folder / "plan.json").write_text(json.dumps(header))
    with pytest.MonkeyPatch.context() as patch:
        digests = []
        patch.setattr(Plan, "digest", lambda self: digests.append(self._digest) or header["digest"])
        try:
            rana_fx.load_plan(folder)
        except PlanFileError:
            return
        header["digest"] = digests[-1]
    (folder / "plan.json").write_text(json.dumps(header))


def adapter(number, **changed):
    return lambda plan: plan["adapters"][number].update(changed)


def site(number, **changed):
    return lambda plan: plan["sites"][number].update(changed)


def fill(name, value):
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


FACTS = {
    "a linear in two adapters": (adapter(1, sites=["q"]), "replaced linear q is there twice"),
    "a linear twice in one": (adapter(0, sites=["q", "q"]), "replaced linear q is there twice"),
    "an adapter twice": (adapter(1, name="q+k"), r"adapter q\+k is there twice"),
    "a linear twice": (site(1, name="q"), "linear q is there twice|replaces k"),
    "an unknown gate": (adapter(2, gate="nothing"), "its gate nothing is not among the linears"),
    "a gate of another kind": (adapter(0, gate="gate"), "a rank adapter has a gate"),
    "an unknown linear beside": (adapter(2, also=["nothing"]), "replaces nothing, which is not among"),
    "an unknown kind": (adapter(0, kind="soup"), "kind"),
    "an unknown role": (site(0, role="cook"), "role 'cook' is none of attention_in"),
    "an unknown dtype": (site(0, dtype="float13"), "dtype 'float13' is no floating dtype"),
    "a dtype of whole numbers": (site(0, dtype="int8"), "dtype 'int8' is no floating dtype"),
    "no dtype at all": (site(0, dtype="nn"), "dtype 'nn' is no floating dtype"),
    "an unknown metric": (lambda plan: plan.update(metric="joules"), "metric 'joules' is none of"),
    "a budget of zero": (lambda plan: plan.update(budget=0.0), "budget 0.0"),
    "a NaN budget": (lambda plan: plan.update(budget=math.nan), "budget nan"),
    "an infinite budget": (lambda plan: plan.update(budget=math.inf), "budget inf"),
    "negative tokens": (lambda plan: plan.update(tokens=-1), "-1 calibration tokens"),
    "a huge integer": (site(3, out_features=10**300), "sizes"),
    "a huge number": (adapter(0, flops=10**400), "flops|too large|not match"),
    "no uses": (site(0, uses=0), "sizes and uses"),
    "a negative size": (site(0, in_features=-4), "reads 4 inputs"),
    "NaN kept": (adapter(0, kept=math.nan), "q\\+k"),
    "infinite kept": (adapter(0, kept=math.inf), "q\\+k"),
    "too many kept": (adapter(2, kept=6.5), "down"),
    "NaN costs": (adapter(0, bytes=math.nan), "costs"),
    "negative costs": (adapter(0, dense_flops=-1.0), "costs"),
    "a negative error": (adapter(0, error=-0.1), "error -0.1"),
    "no linears": (adapter(0, sites=[]), "q\\+k"),
    "another rank": (adapter(0, ranks=4), "expected"),
    "a surrogate": (adapter(0, name="\ud800"), "surrogates not allowed|digest"),
}
TENSORS = {
    "NaN thresholds": (fill("0.tau", math.nan), "tau has thresholds that are NaN"),
    "negative thresholds": (fill("0.tau", -1.0), "tau has negative thresholds"),
    "negative thresholds of a router": (fill("0.router_tau", -1.0), "router_tau has negative thresholds"),
    "NaN thresholds of outputs": (fill("1.exact_tau", math.nan), "exact_tau has thresholds that are NaN"),
    "NaN factors": (fill("0.weight", math.nan), "weight has numbers that are NaN or infinite"),
    "infinite factors": (fill("0.router", math.inf), "router has numbers that are NaN or infinite"),
    "an infinite bias": (fill("0.bias", math.inf), "bias has numbers that are NaN or infinite"),
    "an extra tensor": (lambda t: t.update({"0.shadow": torch.ones(2)}), "tensors that no adapter has: 0.shadow"),
    "a tensor of no adapter": (lambda t: t.update({"7.tau": torch.ones(2)}), "tensors that no adapter has: 7.tau"),
    "a missing factor": (lambda t: t.pop("0.weight"), "a router needs a weight"),
    "a missing threshold": (lambda t: t.pop("2.tau"), "2.tau"),
    "a missing bias": (lambda t: t.pop("0.bias"), "a shift needs a bias"),
    "another shape": (lambda t: t.update({"0.weight": torch.ones(3, 11)}), "expected"),
    "another dtype": (lambda t: t.update({"0.tau": torch.ones(3, dtype=torch.float64)}), "expected"),
    "whole numbers": (lambda t: t.update({"0.bias": torch.ones(12, dtype=torch.int64)}), "expected"),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_that_no_recipe_makes(folder, name):
    change, text = FACTS[name]
    rewrite(folder, change)
    with pytest.raises(PlanFileError, match=text):
        rana_fx.load_plan(folder)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_no_recipe_makes(folder, name):
    change, text = TENSORS[name]
    rewrite(folder, tensors=change)
    with pytest.raises(PlanFileError, match=text):
        rana_fx.load_plan(folder)


def test_the_changes_above_are_what_is_refused(folder):
    """A change that is none of these loads, so that the digest is not what refuses the others."""
    rewrite(folder, lambda plan: plan.update(budget=0.25), fill("0.tau", 5.0))
    found = rana_fx.load_plan(folder)
    assert found.budget == 0.25 and found.adapters[0].tau[0] == 5.0


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4), st.just([]), st.just({}),
    st.sampled_from(["up", "q", "rank", "gated", "float16", "int8", 10**400, "NaN"]),
)  # fmt: skip


def paths(value, way=()):
    yield way
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*way, key))


@given(st.data())
def test_every_mutation_of_the_header_is_refused_or_loads_equal(data):
    with tempfile.TemporaryDirectory() as name:
        folder, plan = Path(name), plan_of()
        plan.save(folder)
        header = json.loads((folder / "plan.json").read_text())
        for _ in range(data.draw(st.integers(1, 2))):
            *way, last = data.draw(st.sampled_from([way for way in paths(header) if way]))
            owner = header
            for key in way:
                owner = owner[key]
            how = data.draw(st.sampled_from(["replace", "remove", "copy", "add"]))
            if how == "replace":
                owner[last] = data.draw(LEAVES)
            elif how == "remove":
                del owner[last]
            elif isinstance(owner, list):
                owner.insert(last, copy.deepcopy(owner[last]))
            else:
                owner[data.draw(st.text(max_size=3))] = copy.deepcopy(owner[last])
        (folder / "plan.json").write_text(json.dumps(header))
        refused_or_equal(folder, plan)


@given(st.data())
def test_every_mutation_of_the_bytes_is_refused_or_loads_equal(data):
    with tempfile.TemporaryDirectory() as name:
        folder, plan = Path(name), plan_of()
        plan.save(folder)
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if how == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del content[at : at + data.draw(st.integers(1, 64))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        path.write_bytes(content)
        refused_or_equal(folder, plan)


@given(st.data())
def test_every_mutation_of_the_tensors_is_refused(data):
    """Under a name that matches the new bytes; tensors are part of the digest, and others than an adapter's are refused."""
    with tempfile.TemporaryDirectory() as name:
        folder, plan = Path(name), plan_of()
        plan.save(folder)
        header = json.loads((folder / "plan.json").read_text())
        tensors = safetensors.torch.load((folder / header["tensors"]).read_bytes())
        key = data.draw(st.sampled_from(sorted(tensors)))
        how = data.draw(st.sampled_from(["remove", "rename", "dtype", "shape", "value", "swap"]))
        value = tensors.pop(key)
        if how == "rename":
            tensors[data.draw(st.sampled_from(["9.tau", "0.x", "", key + " ", "tau"]))] = value
        elif how == "dtype":
            tensors[key] = value.to(data.draw(st.sampled_from([torch.float16, torch.float64, torch.int8, torch.bool])))
        elif how == "shape":
            tensors[key] = data.draw(st.sampled_from([value[None], value[:-1], value.repeat(2, *[1] * (value.dim() - 1))]))
        elif how == "value":
            tensors[key] = value.clone()
            tensors[key].view(-1)[0] = data.draw(st.sampled_from([math.nan, -1.0, 0.125, 1e30]))
        elif how == "swap":
            tensors[key] = torch.rand_like(value)
        content = safetensors.torch.save(tensors)
        header["tensors"] = f"plan-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        (folder / header["tensors"]).write_bytes(content)
        (folder / "plan.json").write_text(json.dumps(header))
        refused_or_equal(folder, plan)


def refused_or_equal(folder, plan):
    try:
        found = rana_fx.load_plan(folder)
    except (PlanFileError, PlanVersion):
        return
    assert found.digest() == plan.digest() and found.to_dict() == plan.to_dict()
    for ours, theirs in zip(plan.adapters, found.adapters, strict=True):
        assert all(torch.equal(value, theirs.tensors()[key]) for key, value in ours.tensors().items())


def test_the_plan_of_these_tests_is_one(folder):
    found = rana_fx.load_plan(folder)
    assert whole(folder, plan_of()) and found.to_dict() == plan_of().to_dict()
    with pytest.raises(PlanFileError, match="does not match its digest"):
        header = json.loads((folder / plan_io.HEADER).read_text())
        header["plan"]["seed"] = 7
        (folder / plan_io.HEADER).write_text(json.dumps(header))
        rana_fx.load_plan(folder)
    assert replace(plan_of(), seed=7).digest() != plan_of().digest()
