"""LoRA on disk: read as saved or refused, whatever happened to the files; a load that fails leaves the model as it was."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

pytest.importorskip("peft")

import peft

from rana_fx.errors import CheckpointError, InvalidOption
from rana_fx.runtime.attachment import attached
from rana_fx.training import add_lora, load_lora, lora_config, lora_files, save_lora
from tests.support.trained import adapted

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def moved(alpha=8.0, rank=4, seed=0):
    """A model with LoRA as if it had been trained."""
    model, _ = adapted(depth=1)
    torch.manual_seed(seed)
    for parameter in add_lora(model, lora_config(rank=rank, alpha=alpha)).values():
        with torch.no_grad():
            parameter.normal_(0, 0.05)
    return model


def state(model):
    """What LoRA adds to each matrix."""
    return {addition.name: addition.value() for addition in attached(model).factors.lowrank.additions()}


def same(got, expected):
    return got.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in got.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, what was saved)."""
    folder, model = tmp_path_factory.mktemp("lora"), moved()
    save_lora(model, folder)
    return folder, state(model)


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "lora")
    return tmp_path / "lora"


def refused(folder, text):
    """Whether loading raises, and the model is as it was."""
    model, _ = adapted(depth=1)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = {name: (parameter.requires_grad, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match=text):
        load_lora(model, folder)
    assert attached(model).factors.lowrank is None
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name].requires_grad == grad and torch.equal(after[name], value) for name, (grad, value) in before.items())


def rewrite(folder, change, *, checksum=False):
    """Other tensors; without a checksum, as of earlier versions, unless it is asked for."""
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    tensors = safetensors.torch.load(content)
    change(tensors)
    kept = metadata if checksum else {key: metadata[key] for key in ("format", "plan")}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata=kept))


def edit(folder, **changed):
    facts = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(facts | changed))


def test_it_is_read_as_saved_with_a_checksum_and_without(saved, folder):
    for change in (lambda: None, lambda: rewrite(folder, lambda tensors: None)):
        change()
        model, _ = adapted(depth=1)
        added = load_lora(model, folder)
        assert same(state(model), saved[1]) and all(parameter.requires_grad for parameter in added.values())


def test_peft_reads_it(saved):
    weights = peft.utils.load_peft_weights(str(saved[0]), device="cpu")
    config = peft.PeftConfig.from_pretrained(str(saved[0]))
    assert config.r == 4 and config.lora_alpha == 8.0 and len(weights) == 2 * len(saved[1]) == 2 * len(config.target_modules)


def first(tensors, part="lora_A"):
    return next(name for name in sorted(tensors) if part in name)


TENSORS = {
    "half of them": (lambda t: [t.pop(name) for name in sorted(t)[::2]], "it lacks matrices"),
    "none": (lambda t: t.clear(), "it lacks matrices"),
    "one more": (lambda t: t.update({"lm_tail.lora_A.weight": torch.ones(4, 3)}), "others than its targets have: lm_tail"),
    "one row": (lambda t: t.update({first(t): t[first(t)][:1]}), r"is \(1, \d+\) torch.float32, expected \(4, \d+\)"),
    "another rank": (lambda t: t.update({first(t): torch.ones(5, t[first(t)].shape[1])}), r"is \(5, "),
    "a vector": (lambda t: t.update({first(t): t[first(t)][0]}), "expected"),
    "another dtype": (lambda t: t.update({first(t): t[first(t)].half()}), "torch.float16, expected .* torch.float32"),
    "NaN": (lambda t: t[first(t)].view(-1)[:1].fill_(math.nan), "not finite"),
    "infinity": (lambda t: t[first(t, "lora_B")].view(-1)[:1].fill_(math.inf), "not finite"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_matrices_that_do_not_fit(folder, name):
    change, text = TENSORS[name]
    rewrite(folder, change)
    refused(folder, text)


CONFIGS = {
    "another rank": ({"r": 8}, r"is \(4, \d+\) torch.float32, expected \(8, "),
    "fewer targets": ({"target_modules": ["lm_head"]}, "it lacks matrices, or has others"),
    "another method": ({"peft_type": "LOHA"}, "is not one of LoRA"),
    "no method": ({"peft_type": None}, "is not one of LoRA"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_options_that_do_not_fit(folder, name):
    changed, text = CONFIGS[name]
    edit(folder, **changed)
    if "method" not in name:
        refused(folder, "the options of its LoRA do not match their checksum")
    rewrite(folder, lambda tensors: None)  # without checksums
    refused(folder, text)


@pytest.mark.parametrize(
    "changed",
    [{"r": 10**9}, {"r": "4"}, {"r": -1}, {"r": True}, {"lora_alpha": "x"}, {"lora_alpha": math.nan}, {"lora_dropout": 2}],
    ids=str,
)
def test_absurd_options_of_files_without_a_checksum(folder, changed):
    edit(folder, **changed)
    rewrite(folder, lambda tensors: None)
    model, _ = adapted(depth=1)
    with pytest.raises(InvalidOption, match=next(iter(changed))):
        load_lora(model, folder)
    assert attached(model).factors.lowrank is None


@pytest.mark.parametrize("changed", [{"lora_alpha": 64}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str)
def test_options_of_another_save_are_noticed(folder, changed):
    """What no shape tells: the same matrices would mean something else."""
    edit(folder, **changed)
    refused(folder, "the options of its LoRA do not match their checksum")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "folder", "fifo", "deep"])
def test_files_that_are_none(folder, name, kind):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "fifo":
        os.mkfifo(folder / name)
    elif kind != "missing":
        text = {"truncated": content[:-9], "empty": b"", "deep": b"[" * 200_000}[kind]
        (folder / name).write_bytes(text)
    refused(folder, "it holds no LoRA")


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # peft's, of an option that it does not know
def test_flipped_bits_are_refused_or_change_nothing(saved, folder):
    generator = random.Random(0)
    kinds = set()
    for name in [WEIGHTS] * 40 + [CONFIG] * 10:
        content = bytearray((saved[0] / name).read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (folder / name).write_bytes(content)
        model, _ = adapted(depth=1)
        try:
            load_lora(model, folder)
        except (CheckpointError, InvalidOption):
            assert attached(model).factors.lowrank is None
            kinds.add("refused")
        else:
            assert same(state(model), saved[1])
        (folder / name).write_bytes((saved[0] / name).read_bytes())
    assert "refused" in kinds


def test_an_interrupted_save_leaves_the_old_one(folder, saved, monkeypatch):
    """Stopped before any of its changes of the folder: what loads is the old state or the new one, never a mixture."""
    new, seen = moved(alpha=64.0, seed=1), set()
    for count in range(1, 60):
        target = folder.parent / str(count)
        shutil.copytree(saved[0], target)
        done = []

        def counted(real, done=done, count=count):
            def change(*args, **given):
                done.append(real)
                if len(done) >= count:
                    raise KeyboardInterrupt
                return real(*args, **given)

            return change

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "replace"), (Path, "symlink_to"), (Path, "unlink"), (shutil, "rmtree"), (os, "fsync")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                save_lora(new, target)
            except KeyboardInterrupt:
                stopped = True
            else:
                stopped = False
        model, _ = adapted(depth=1)
        load_lora(model, target)
        got = state(model)
        assert same(got, saved[1]) or same(got, state(new)), count
        seen.add(same(got, saved[1]))
        if not stopped:
            break
    assert seen == {True, False} and count > 8


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file could not be written: File exists. No LoRA was left there"):
        save_lora(moved(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk(folder, name, before, monkeypatch):
    """The file that did not fit, and what is there: as it was."""
    if not before:
        shutil.rmtree(folder)
    content = {path.name: path.read_bytes() for path in folder.iterdir()} if before else None

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner, function = (peft.PeftConfig, "save_pretrained") if name == CONFIG else (lora_files, "write_bytes")
    monkeypatch.setattr(owner, function, full)
    kept = "The LoRA that was there before is unchanged" if before else "No LoRA was left there"
    with pytest.raises(CheckpointError, match=f"lora/{name} could not be written: No space left on device. {kept}; free space"):
        save_lora(moved(seed=3), folder)
    assert not before or {path.name: path.read_bytes() for path in folder.iterdir()} == content
    assert before or not list(folder.iterdir())


def test_a_model_that_has_some_keeps_it(folder):
    model = moved(seed=3)
    before = copy.deepcopy(state(model))
    with pytest.raises(InvalidOption, match="merge_lora"):
        load_lora(model, folder)
    assert same(state(model), before)
