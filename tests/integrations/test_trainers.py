"""Other trainers: a model compiled in place, the Trainer of transformers, a loop of accelerate; only Inductor is replaced."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from rana_fx._backend import rewritten
from rana_fx.errors import MissingPackage
from rana_fx.runtime.attachment import attached
from rana_fx.training import add_lora, lora_config, register_with_accelerate, train, trainable, trained_plan
from tests.support.trained import SETTINGS, adapted, compiled, gradients, texts

ROWS = [{"input_ids": row, "labels": row} for batch in texts(8) for row in batch["input_ids"]]


@pytest.fixture
def graphs(graphs_as_rewritten):
    """Graphs that the backend "rana" compiles; the rewritten graphs run eagerly."""
    yield graphs_as_rewritten
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def unregistered(monkeypatch):
    monkeypatch.setattr(DynamoBackend, "_missing_", classmethod(lambda cls, value: None))


def masked(graphs):
    return sum(str(node.target).startswith("rana.masked_gemv") for gm in graphs for node in gm.graph.nodes)


def arguments(folder, save=0, **more):
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, report_to=[], save_strategy="steps" if save else "no", save_steps=save or 1,
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, logging_steps=1, **more,
    )  # fmt: skip


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_model_compiled_in_place_trains():
    model, batch = adapted(depth=1, name="llama")
    chosen = trainable(model)
    _, expected = gradients(model, compiled(model), batch)
    torch._dynamo.reset()
    model.compile(backend=rewritten)
    _, got = gradients(model, model, batch)
    assert set(got) == set(chosen)
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name])
    assert len(train(model, texts(4), settings=SETTINGS, progress=False).losses) == 2
    assert trained_plan(model).digest() != attached(model).plan.digest()


def test_accelerate_refuses_the_name_until_it_is_registered(unregistered, monkeypatch):
    with pytest.raises(ValueError, match="'RANA' is not a valid DynamoBackend"):
        TorchDynamoPlugin(backend="rana")
    register_with_accelerate()
    register_with_accelerate()
    assert TorchDynamoPlugin(backend="rana").to_kwargs()["backend"] == "rana"
    with pytest.raises(ValueError, match="'RANNA' is not a valid DynamoBackend"):
        TorchDynamoPlugin(backend="ranna")
    monkeypatch.setitem(sys.modules, "accelerate.utils", None)
    with pytest.raises(MissingPackage, match=r"torch_compile_backend=\"rana\" needs the package accelerate.*'rana-fx\[train\]'"):
        register_with_accelerate()


@pytest.mark.filterwarnings("default")
def test_the_trainer_compiles_by_name(graphs, unregistered, tmp_path):
    model, _ = adapted(depth=1, name="llama")
    chosen = {name: p.detach().clone() for name, p in add_lora(model).items()}
    settings = arguments(
        tmp_path, max_steps=6, gradient_accumulation_steps=2, torch_compile=True, torch_compile_backend="rana", bf16=True
    )
    with pytest.raises(ValueError, match="'RANA' is not a valid DynamoBackend"):
        Trainer(model, settings, train_dataset=ROWS)
    register_with_accelerate()
    trainer = Trainer(model, settings, train_dataset=ROWS)
    trainer.train()
    assert masked(graphs) and losses(trainer)[-1] < losses(trainer)[0]
    live = dict(model.named_parameters())
    assert all(not torch.equal(live[name], value) for name, value in chosen.items())
    assert trained_plan(model).digest() != attached(model).plan.digest()


@pytest.mark.filterwarnings("default")
def test_the_trainer_takes_a_compiled_model_and_checkpoints_gradients(graphs, tmp_path):
    model, _ = adapted(depth=1, name="llama")
    trainable(model)
    model.compile(backend="rana")
    settings = arguments(
        tmp_path, max_steps=4, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    trainer = Trainer(model, settings, train_dataset=ROWS)
    trainer.train()
    assert masked(graphs) and losses(trainer)[-1] < losses(trainer)[0]
    assert trained_plan(model).digest() != attached(model).plan.digest()


@pytest.mark.filterwarnings("default")
def test_the_trainer_resumes_from_its_own_checkpoints(graphs, tmp_path):
    found = []
    for start in (None, str(tmp_path / "checkpoint-2")):
        model, _ = adapted(depth=1, name="llama")
        add_lora(model)
        model.compile(backend="rana")
        trainer = Trainer(model, arguments(tmp_path, max_steps=3, save=2), train_dataset=ROWS)
        trainer.train(resume_from_checkpoint=start)
        found.append((losses(trainer), trained_plan(model).digest()))
    assert masked(graphs) and found[0] == found[1]


@pytest.mark.filterwarnings("default")
def test_a_loop_of_accelerate(graphs):
    register_with_accelerate()
    model, _ = adapted(depth=1, name="llama")
    added = add_lora(model, lora_config(rank=8))
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2, dynamo_plugin=TorchDynamoPlugin(backend="rana")
    )
    optimizer = torch.optim.AdamW(added.values(), lr=1e-2)
    fast, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(ROWS, batch_size=2))
    seen = []
    for batch in loader:
        with accelerator.accumulate(fast):
            loss = fast(**batch, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(loss.detach()))
    assert masked(graphs) and sum(seen[-4:]) < sum(seen[:4])
    plan = trained_plan(accelerator.unwrap_model(fast))
    assert plan.digest() != attached(model).plan.digest()
