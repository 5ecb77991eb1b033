"""A plan's folder as an option: another plan that is saved there is used by what is compiled from then on; plans are freed."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch

import rana_fx
from rana_fx.errors import PlanFileError
from rana_fx.runtime.plan_folder import Folder
from tests.support.adapted import adapted, relative
from tests.support.architectures import ids, output

pytestmark = pytest.mark.usefixtures("graphs_as_rewritten")


@pytest.fixture
def two_plans():
    """(a model without a plan, a batch, two plans of it)."""
    model, batch, first = adapted()
    rana_fx.detach(model)
    second = rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=0.5, recipe="static", progress=False)
    rana_fx.detach(model)
    return model, batch, first, second


def test_a_plan_saved_over_another_is_used(two_plans, tmp_path, graphs_as_rewritten):
    model, batch, *plans = two_plans

    def compiled(options):
        with torch.no_grad():
            return output(torch.compile(model, backend=rana_fx.backend, options=options)(**batch)).clone()

    first, second = (compiled({"plan": plan}) for plan in plans)
    assert relative(first, second) > 1e-2
    plans[0].save(tmp_path)
    kept = {"plan": str(tmp_path)}
    assert torch.equal(compiled(kept), first)
    graphs = len(graphs_as_rewritten)
    assert torch.equal(compiled(kept), first) and torch.equal(compiled({"plan": Path(tmp_path)}), first)
    assert len(graphs_as_rewritten) == graphs  # the folder is as it was: nothing compiles again
    assert kept == {"plan": str(tmp_path)} and type(kept["plan"]) is str
    plans[1].save(tmp_path)
    assert torch.equal(compiled(kept), second)
    times = (tmp_path / "plan.json").stat()
    shutil.rmtree(tmp_path)
    plans[0].save(tmp_path)
    os.utime(tmp_path / "plan.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    torch.compiler.reset()
    assert torch.equal(compiled(kept), first)


def test_a_folder_equals_its_path_while_its_content_stays(two_plans, tmp_path):
    _, _, first, second = two_plans
    first.save(tmp_path / "a")
    folder = Folder(tmp_path / "a")
    plan = folder.load()
    assert plan.digest() == first.digest() and Folder(tmp_path / "a").load() is plan  # one copy of the factors
    assert str(tmp_path / "a") == folder and tmp_path / "a" == folder and folder == str(tmp_path / "a" / "..") + "/a"
    assert folder != str(tmp_path) and folder != 3 and repr(folder) == repr(str(tmp_path / "a"))
    (tmp_path / "a" / "plan.json").touch()
    assert folder == str(tmp_path / "a")
    second.save(tmp_path / "a")
    assert folder != str(tmp_path / "a")
    again = Folder(tmp_path / "a")
    assert again.load().digest() == second.digest() and again != folder


@pytest.mark.parametrize("given", ["a plan", "a folder"])
def test_a_plan_is_freed_with_its_last_user(two_plans, tmp_path, given, monkeypatch):
    import rana_fx.runtime.plan_folder as module

    model, batch, plan, _ = two_plans
    plan.save(tmp_path)
    loaded = []
    original = module.load_plan

    def load(folder):
        found = original(folder)
        loaded.append(weakref.ref(found))
        return found

    monkeypatch.setattr(module, "load_plan", load)
    option = rana_fx.load_plan(tmp_path) if given == "a plan" else str(tmp_path)
    loaded += [weakref.ref(option)] if given == "a plan" else []
    fast = torch.compile(model, backend=rana_fx.backend, options={"plan": option})
    del option
    with torch.no_grad():
        for tokens in (6, 7, 8):
            fast(**ids(tokens))
    assert len(loaded) == 1 and loaded[0]() is not None
    del fast
    torch.compiler.reset()
    gc.collect()
    assert loaded[0]() is None


def test_weights_written_in_place_are_noticed(two_plans):
    """Digests are remembered with what the weight was."""
    model, batch, plan, _ = two_plans
    with torch.no_grad():
        torch.compile(model, backend=rana_fx.backend, options={"plan": plan})(**batch)
        torch.compiler.reset()
        model.model.layers[0].mlp.up_proj.weight.data.mul_(2)  # no version counts this write
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="up_proj: got digest"):
            torch.compile(model, backend=rana_fx.backend, options={"plan": plan})(**batch)


def test_a_header_that_never_ends_is_an_error(two_plans, tmp_path):
    """A read of a FIFO waits for a process that writes."""
    model, batch, plan, _ = two_plans
    plan.save(tmp_path)
    folder = Folder(tmp_path)
    folder.load()
    (tmp_path / "plan.json").unlink()
    os.mkfifo(tmp_path / "plan.json")
    found = []
    thread = threading.Thread(target=lambda: found.append(folder == str(tmp_path)), daemon=True)
    thread.start()
    thread.join(60)
    assert found == [False]
    with pytest.raises(PlanFileError, match="not a regular file"):
        Folder(tmp_path).load()
