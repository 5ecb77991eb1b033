"""Inputs of adapt: wrapped and compiled models, batches of every type, padding in any position."""

from __future__ import annotations

import collections
import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BatchEncoding
from transformers.utils import ModelOutput

import rana_fx
from rana_fx.calibration.calibrate import calibrate
from rana_fx.errors import InvalidOption
from rana_fx.runtime.attachment import attached
from tests.support.architectures import build, ids

SITE = "model.layers.0.self_attn.q_proj"


def adapt(model, batches=None):
    return rana_fx.adapt(
        model, [ids() for _ in range(4)] if batches is None else batches, budget=0.7, recipe="paper", progress=False
    )


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def forward_compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def layer_compiled_in_place(model):
    model.model.layers[0].compile(backend="eager")
    return model


def layer_compiled(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "module.compile": compiled_in_place,
    "forward": forward_compiled,
    "a layer's compile": layer_compiled_in_place,
    "a layer": layer_compiled,
    "DataParallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.fixture(scope="module")
def unwrapped():
    """(a model, batches, its plan)."""
    model, _ = build("plain_llama", 1)
    batches = [ids() for _ in range(4)]
    adapt(model, batches)
    return model, batches, rana_fx.detach(model)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_models_have_the_plan_of_the_model_itself(kind, unwrapped):
    model, batches, plain = unwrapped
    model, batch = copy.deepcopy(model), batches[0]
    wrapped = WRAPPERS[kind](model)
    with torch.no_grad():
        before = wrapped(**batch).logits
    plan = adapt(wrapped, batches)
    assert plan.digest() == plain.digest()
    assert attached(wrapped).plan is plan
    assert rana_fx.explain(wrapped, batch).plan == plan.digest()[:12]
    assert rana_fx.detach(wrapped) is plan
    rana_fx.attach(wrapped, plain)
    assert attached(model).plan is plain
    with torch.no_grad():
        assert torch.equal(wrapped(**batch).logits, before)  # still compiled by the original backend


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_compiled_model_is_adapted_on_its_next_call():
    model, batch = build("plain_llama", 1)
    compiled = torch.compile(model, backend=rana_fx.backend)
    adapt(compiled)
    with torch.no_grad():
        adapted = compiled(**batch).logits
        expected = torch.compile(model, backend=rana_fx.backend)(**batch).logits
        assert torch.equal(adapted, expected)
        assert not torch.allclose(adapted, model(**batch).logits)


@pytest.mark.parametrize("batches", [ids(), ids()["input_ids"], "text", None, 3], ids=lambda value: type(value).__name__)
def test_one_batch_is_not_many(batches):
    model, _ = build("plain_llama", 1)
    with pytest.raises(InvalidOption, match=r"batches='\w+' is not valid: expected an iterable of batches.*put a single batch"):
        rana_fx.adapt(model, batches, progress=False)


# ---- shapes of batches


class Nested(nn.Module):
    """Unpacks a nested batch."""

    def __init__(self, take):
        super().__init__()
        self.model, self.take = build("plain_llama", 1)[0], take

    def forward(self, batch):
        return self.model(**self.take(batch))


@dataclasses.dataclass
class Fields:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    note: str = "kept as it is"


@dataclasses.dataclass
class Output(ModelOutput):
    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


Named = collections.namedtuple("Named", "input_ids attention_mask")
TAKEN = ("input_ids", "attention_mask")

SHAPES = {
    "dict": (None, dict),
    "BatchEncoding": (None, BatchEncoding),
    "lists": (None, lambda batch: {key: value.tolist() for key, value in batch.items()}),
    "numpy": (None, lambda batch: {key: value.numpy() for key, value in batch.items()}),
    "ModelOutput": (None, lambda batch: Output(**batch)),
    "nested": (lambda found: found["a"][0], lambda batch: ({"a": [batch]},)),
    "nested BatchEncoding": (lambda found: found["a"], lambda batch: ({"a": BatchEncoding(batch)},)),
    "nested ModelOutput": (lambda found: {key: getattr(found["a"], key) for key in TAKEN}, lambda b: ({"a": Output(**b)},)),
    "dataclass": (lambda found: {key: getattr(found, key) for key in TAKEN}, lambda batch: Fields(**batch)),
    "namedtuple": (lambda found: found._asdict(), lambda batch: (Named(**batch),)),
}


@pytest.mark.parametrize(("shape", "side"), [*((shape, "left") for shape in SHAPES), ("dict", "right"), ("nested", "right")])
def test_padding_does_not_count_in_any_shape_of_batch(shape, side):
    take, make = SHAPES[shape]
    model = build("plain_llama", 1)[0] if take is None else Nested(take)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    found = calibrate(
        model, [make(ids() | {"attention_mask": mask})], wanted=lambda layout: {layout.groups[0].sites}, progress=False
    )
    assert found.tokens == 19
    assert next(iter(found.samples.values())).seen == 19


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
@pytest.mark.parametrize("loader", [False, True], ids=["rows", "DataLoader"])
def test_datasets(kind, loader):
    rows = Dataset.from_dict(
        {"input_ids": [ids(24)["input_ids"][0].tolist() for _ in range(6)], "attention_mask": [[1] * 24] * 6}
    )
    batches = rows.with_format(kind)
    if loader:
        batches = torch.utils.data.DataLoader(rows.with_format("torch"), batch_size=3)
    assert adapt(build("plain_llama", 1)[0], batches).tokens == 144


def test_padding_of_time_first_layers():
    """torch.nn.TransformerEncoder without batch_first takes (time, batch, features) and a mask (batch, time)."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0), 1, enable_nested_tensor=False)

        def forward(self, x, src_key_padding_mask):
            return self.layers(x, src_key_padding_mask=src_key_padding_mask)

    padding = torch.zeros(3, 10, dtype=torch.bool)
    padding[0, 4:] = True
    x = torch.randn(10, 3, 16)
    x[4:, 0] = 77.0  # content of the padding
    found = calibrate(
        Encoder(), [{"x": x, "src_key_padding_mask": padding}], wanted=lambda layout: {layout.groups[0].sites}, progress=False
    )
    rows = next(iter(found.samples.values())).rows()
    assert found.tokens == len(rows) == 24
    assert float(rows.max()) < 77


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_factors_made_in_inference_mode_can_be_trained():
    model, batch = build("plain_llama", 1)
    with torch.inference_mode():
        adapt(model)
    torch.compile(model, backend=rana_fx.backend)(**batch).logits.sum().backward()
    assert model.rana_fx.a0_router.grad is not None


def test_factors_of_frozen_weights_are_frozen():
    model, _ = build("plain_llama", 1)
    model.model.layers[0].self_attn.requires_grad_(False)
    adapt(model)
    assert not model.rana_fx.a0_router.requires_grad
    assert model.rana_fx.a1_router.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, request):
    if dtype != torch.float16:  # bf16 is compiled in test_decode.py
        request.getfixturevalue("graphs_as_rewritten")
    model, batch = build("plain_llama", 1)
    plan = adapt(model.to(dtype))
    assert {value.dtype for adapter in plan.adapters for key, value in adapter.tensors().items() if key != "tau"} == {dtype}
    with torch.no_grad():
        assert torch.compile(model, backend=rana_fx.backend)(**batch).logits.dtype == dtype
