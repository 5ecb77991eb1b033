"""A trained model and its plan: the old pair or the new one after a kill at any point; a mixture is noticed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import rana_fx
from rana_fx.errors import PlanMismatch, PlanWriteError
from rana_fx.training import trained_plan
from rana_fx.training.saved_pair import save_pair
from tests.support.trained import adapted


class Tokenizer:
    """What is saved of one."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def trained(amount):
    """(model without a plan, its plan) as after a training that moved every weight."""
    model, _ = adapted(depth=1, name="llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount)
    plan = trained_plan(model)
    rana_fx.detach(model)
    return model, plan


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(folder of the old pair, digest of its plan, the new pair)."""
    folder, (model, plan) = tmp_path_factory.mktemp("pair") / "old", trained(0.0)
    save_pair(folder, model, Tokenizer(), plan)
    return folder, plan.digest(), trained(0.01)


def loaded(folder):
    """Digest of the plan in a folder, which fits the model in it."""
    model, plan = LlamaForCausalLM.from_pretrained(folder / "model"), rana_fx.load_plan(folder / "plan")
    rana_fx.attach(model, plan)
    return plan.digest()


def test_it_is_written_as_save_and_save_pretrained_do(pairs, tmp_path):
    folder, digest, (model, plan) = pairs
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (folder / "model").iterdir()} == {
        *(path.name for path in (tmp_path / "model").iterdir()), "tokenizer.json",
    }  # fmt: skip
    assert loaded(folder) == digest != plan.digest() and sorted(path.name for path in folder.iterdir()) == ["model", "plan"]


def test_the_old_pair_or_the_new_one_after_every_kill(pairs, tmp_path, monkeypatch):
    old, digest, (model, plan) = pairs
    seen, done = [], []

    def counted(real, limit):
        def change(*args, **given):
            done.append(real)
            if len(done) >= limit:
                raise KeyboardInterrupt
            return real(*args, **given)

        return change

    for limit in range(1, 200):
        folder = tmp_path / str(limit)
        shutil.copytree(old, folder)
        (folder / "checkpoint.pt").write_bytes(b"of the training")
        done.clear()
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "replace"), (Path, "symlink_to"), (Path, "unlink"), (shutil, "rmtree"), (os, "fsync")):
                patch.setattr(owner, name, counted(getattr(owner, name), limit))
            try:
                save_pair(folder, model, Tokenizer(), plan)
            except KeyboardInterrupt:
                stopped = True
            else:
                stopped = False
        seen.append(loaded(folder))
        assert seen[-1] in (digest, plan.digest()) and (folder / "checkpoint.pt").read_bytes() == b"of the training"
        if not stopped:
            break
        if limit % 10 == 0:
            save_pair(folder, model, Tokenizer(), plan)
            assert loaded(folder) == plan.digest() and not any(path.is_symlink() for path in folder.rglob("*"))
    assert len(seen) > 20 and seen == sorted(seen, key=lambda one: one == plan.digest()) and len(set(seen)) == 2
    assert len(list((folder / "plan").iterdir())) == 2  # tensors of the old plan are gone


def test_a_model_in_more_files_replaces_one_in_one(pairs, tmp_path):
    """transformers prefers model.safetensors to a list of parts: an old one would be loaded instead of the new parts."""
    old, _, (model, plan) = pairs
    shutil.copytree(old, tmp_path / "a")

    class Parts:
        def save_pretrained(self, folder):
            model.save_pretrained(folder, max_shard_size="20KB")

    save_pair(tmp_path / "a", Parts(), Tokenizer(), plan)
    assert not (tmp_path / "a" / "model" / "model.safetensors").exists() and loaded(tmp_path / "a") == plan.digest()
    save_pair(tmp_path / "a", model, Tokenizer(), plan)
    assert len(list((tmp_path / "a" / "model").glob("*.safetensors*"))) == 1 and loaded(tmp_path / "a") == plan.digest()


def test_failures_leave_the_old_pair(pairs, tmp_path):
    old, digest, (model, plan) = pairs
    shutil.copytree(old, tmp_path / "a")

    class Full:
        def save_pretrained(self, folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(PlanWriteError, match="a: No space left on device. Nothing at that path was changed"):
        save_pair(tmp_path / "a", model, Full(), plan)
    assert loaded(tmp_path / "a") == digest and sorted(path.name for path in (tmp_path / "a").iterdir()) == ["model", "plan"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PlanWriteError, match="file: File exists"):
        save_pair(tmp_path / "file", model, Tokenizer(), plan)


def test_a_mixture_is_noticed(pairs, tmp_path):
    old, _, (_, plan) = pairs
    shutil.copytree(old, tmp_path / "a")
    plan.save(tmp_path / "a" / "plan")
    with pytest.raises(PlanMismatch, match="got other weights, expected weights with digest"):
        loaded(tmp_path / "a")
