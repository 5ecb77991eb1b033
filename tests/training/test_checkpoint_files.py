"""Checkpoints of a training: whole, of this training, or refused before anything of the training is changed."""

from __future__ import annotations

import copy
import errno
import math
import os
import pickle
import random
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from rana_fx.errors import CheckpointError
from rana_fx.training import checkpoint, checkpoint_check, train, trainable
from tests.support.trained import SETTINGS, adapted, compiled, texts

SAVED = replace(SETTINGS, checkpoint_every=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, its state) after two of two steps."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, _ = adapted(depth=1)
    trainable(model)
    train(compiled(model), texts(4), settings=SAVED, folder=folder, progress=False)
    return folder, torch.load(folder / checkpoint.NAME, weights_only=True)


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copy(saved[0] / checkpoint.NAME, tmp_path)
    return tmp_path


def resumed(folder):
    model, _ = adapted(depth=1)
    chosen = trainable(model)
    before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    random_state = torch.get_rng_state()
    try:
        train(compiled(model), texts(4), settings=SAVED, folder=folder, resume=True, progress=False)
    except CheckpointError:
        assert all(torch.equal(parameter, before[name]) for name, parameter in chosen.items())
        raise
    finally:
        torch.set_rng_state(random_state)
    return chosen


def put(folder, saved, change, *, checksum):
    """A state that was changed; without a checksum as of earlier versions, or with one that fits, as whoever forges it makes."""
    state = copy.deepcopy(saved[1])
    del state["checksum"]
    state = change(state) or state
    if checksum:
        checkpoint.write(folder, state)
    else:
        torch.save(state, folder / checkpoint.NAME)


def first(state):
    return next(iter(state["parameters"]))


def parameter(change):
    return lambda state: state["parameters"].update({first(state): change(state["parameters"][first(state)])})


def moment(key, change):
    def act(state):
        state["optimizer"]["state"][0][key] = change(state["optimizer"]["state"][0][key])

    return act


def within(part, **changed):
    return lambda state: state[part].update(changed)


STATES = {
    "a missing Parameter": (
        lambda s: s.update(parameters=dict(list(s["parameters"].items())[1:])),
        "it lacks Parameters, or has others",
    ),
    "another Parameter": (within("parameters", other=torch.ones(2)), "it lacks Parameters, or has others: other"),
    "one row": (parameter(lambda p: p[:1]), r"is \(1, \d+\) torch.float32, expected"),
    "another dtype": (parameter(lambda p: p.half()), "torch.float16, expected"),
    "no tensor": (parameter(lambda p: 1.0), "is float, expected"),
    "NaN": (parameter(lambda p: p * math.nan), "values that are not finite"),
    "parameters in a list": (lambda s: s.update(parameters=[1]), "its parameters are a list"),
    "no optimizer": (lambda s: s.pop("optimizer") and None, "it lacks, or should not have: optimizer"),
    "something else": (lambda s: s.update(more=1), "should not have: more"),
    "an empty optimizer": (within("optimizer", param_groups=[]), "other Parameters or options"),
    "another option": (lambda s: s["optimizer"]["param_groups"][0].update(weight_decay=0.5), "other Parameters or options"),
    "no rate": (lambda s: s["optimizer"]["param_groups"][0].pop("lr") and None, "other Parameters or options"),
    "a moment of one row": (moment("exp_avg", lambda t: t[:1]), "exp_avg of .* is"),
    "a NaN moment": (moment("exp_avg_sq", lambda t: t * math.nan), "exp_avg_sq of .* not finite"),
    "NaN steps": (moment("step", lambda t: t * math.nan), "the optimizer's steps of"),
    "a moment too many": (lambda s: s["optimizer"]["state"].update({999: {}}), "its optimizer has other Parameters"),
    "no losses": (within("done", losses=[]), "its losses are not those"),
    "more steps than there are": (within("done", losses=[1.0] * 9, step_seconds=[1.0] * 9), "its losses are not those"),
    "NaN losses": (within("done", losses=[math.nan] * 2), "its losses are not those"),
    "fewer seconds": (within("done", step_seconds=[1.0]), "not as many"),
    "no tokens": (within("done", tokens=-3), "its counts are none"),
    "odd evaluations": (within("done", evaluations=[1, 2]), "its evaluations are none"),
    "a history of something": (lambda s: s.update(done={"tokens": 1}), "its history is none"),
    "no random state": (lambda s: s.update(rng=[]), "its random state is none"),
    "a short random state": (lambda s: s.update(rng=[torch.zeros(3, dtype=torch.uint8)]), "of another length"),
    "GPUs": (lambda s: s["rng"].extend([s["rng"][0]] * 99), "it was made with 99 GPUs"),
    "no fingerprint": (lambda s: s.update(fingerprint=[]), "its fingerprint is none"),
    "a list": (lambda s: [1, 2], "it is a list"),
}


@pytest.mark.parametrize("checksum", [False, True], ids=["without a checksum", "with one that fits"])
@pytest.mark.parametrize("name", STATES)
def test_states_that_no_training_has(folder, saved, name, checksum):
    change, text = STATES[name]
    if checksum and name == "a list":
        pytest.skip("write takes states")
    put(folder, saved, change, checksum=checksum)
    with pytest.raises(CheckpointError, match=text):
        resumed(folder)


def test_a_whole_one_is_resumed_with_a_checksum_and_without(folder, saved):
    for checksum in (True, False):
        put(folder, saved, lambda state: None, checksum=checksum)
        chosen = resumed(folder)  # all steps are done: nothing is trained
        assert all(torch.equal(value, saved[1]["parameters"][name]) for name, value in chosen.items())


def test_what_was_changed_since_is_noticed(folder, saved):
    state = copy.deepcopy(saved[1])
    state["parameters"][first(state)][:1] += 1  # plausible in every other way
    torch.save(state, folder / checkpoint.NAME)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        resumed(folder)


def test_flipped_bits_are_refused_or_change_nothing(folder, saved):
    path, generator = folder / checkpoint.NAME, random.Random(0)
    whole, results = path.read_bytes(), []
    for _ in range(150):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        try:
            found = checkpoint.read(folder, saved[1]["fingerprint"])
        except CheckpointError:
            results.append("refused")
        else:
            assert checkpoint.checksum(found) == saved[1]["checksum"]
            results.append("the same")
    assert results.count("refused") > 75


def test_rates_of_damaged_ones(folder, saved):
    assert checkpoint.rate_of(folder) == SAVED.rate
    for changed, text in (({"setting rate": "fast"}, "its learning rate is 'fast'"), ({}, "its learning rate is None")):
        put(folder, saved, lambda state, changed=changed: state.update(fingerprint=changed), checksum=True)
        with pytest.raises(CheckpointError, match=text):
            checkpoint.rate_of(folder)


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("how", ["pickle", "inside"])
def test_foreign_code_does_not_run(folder, how, monkeypatch):
    monkeypatch.chdir(folder)
    if how == "pickle":
        (folder / checkpoint.NAME).write_bytes(pickle.dumps(Code()))
    else:
        torch.save({"fingerprint": Code()}, folder / checkpoint.NAME)
    with pytest.raises(CheckpointError, match="it is not a complete checkpoint"):
        resumed(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file(folder, kind):
    path = folder / checkpoint.NAME
    path.unlink()
    {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](path)
    with pytest.raises(CheckpointError, match="not a regular file|Is a directory"):
        checkpoint.read(folder, {})


def test_a_full_disk(folder, monkeypatch):
    before = (folder / checkpoint.NAME).read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="pt could not be written: No space left on device. The checkpoint .* is unchanged"):
        checkpoint.write(folder, {})
    assert (folder / checkpoint.NAME).read_bytes() == before


def test_leftovers_of_killed_writes_are_removed(folder, saved):
    for _ in range(3):
        if not (pid := os.fork()):
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            checkpoint.write(folder, saved[1])
        os.waitpid(pid, 0)
        assert checkpoint.read(folder, saved[1]["fingerprint"])
    checkpoint.write(folder, saved[1])
    assert [path.name for path in folder.iterdir()] == [checkpoint.NAME]


def test_numbers_of_torch_and_of_other_releases_pass(saved):
    """Options that one release has and the other has not are not compared."""
    model, _ = adapted(depth=1)
    chosen = trainable(model)
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in chosen}
    optimizer = torch.optim.AdamW(chosen.values(), lr=0.5, weight_decay=SAVED.weight_decay)
    state = copy.deepcopy(saved[1])
    state["optimizer"]["param_groups"][0] |= {"of a later release": 1}
    state["optimizer"]["param_groups"][0].pop("fused")
    checkpoint_check.check(saved[0], state, chosen, optimizer, 2)
