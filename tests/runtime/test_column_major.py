"""Column-major weights: same values and shapes, only for memory that is not shared, and restored on detach."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.runtime.column_major import by_columns_, by_rows_
from tests.support.architectures import build, ids


def test_values_shapes_and_memory_stay():
    weight = nn.Parameter(torch.randn(5, 7))
    before = weight.detach().clone()
    assert by_columns_([weight], among=[weight]) == [weight]
    assert weight.stride() == (1, 5)
    assert torch.equal(weight, before)
    assert weight.untyped_storage().nbytes() == before.untyped_storage().nbytes()
    assert by_columns_([weight], among=[weight]) == []  # already column-major
    by_rows_([weight])
    assert weight.stride() == (7, 1)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("case", ["view", "tied storage", "vector"])
def test_shared_memory_is_left_alone(case):
    flat = torch.randn(40)
    made = {
        "view": lambda: [nn.Parameter(flat[:20].view(4, 5))],
        "tied storage": lambda: [nn.Parameter(flat.view(8, 5)), nn.Parameter(flat.view(8, 5))],
        "vector": lambda: [nn.Parameter(flat)],
    }[case]()
    assert by_columns_(made[:1], among=made) == []
    assert made[0].is_contiguous()


def test_a_weight_that_shares_its_memory_with_a_buffer_is_left_alone():
    model, batches = build("llama", 1)[0], [ids() for _ in range(4)]
    plan = rana_fx.adapt(model, batches, budget=0.7, recipe="paper", progress=False)
    rana_fx.detach(model)
    down = model.model.layers[0].mlp.down_proj
    down.register_buffer("shown", down.weight.data)
    rana_fx.attach(model, plan)
    assert down.weight.is_contiguous() and down.shown.data_ptr() == down.weight.data_ptr()
    report = rana_fx.explain(model, batches[0])
    assert any("shared with another tensor" in row.detail for row in report.rows)


def test_attach_and_detach_undo_each_other():
    model, _ = build("plain_llama", 2)
    before = {name: (parameter.detach().clone(), parameter.stride()) for name, parameter in model.named_parameters()}
    rana_fx.adapt(model, [ids() for _ in range(4)], budget=0.7, recipe="paper", progress=False)
    strides = {name: parameter.stride() for name, parameter in model.named_parameters() if name in before}
    changed = {name for name in strides if strides[name] != before[name][1]}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    twin = copy.deepcopy(model)
    for one in (model, twin):
        rana_fx.detach(one)
        for name, parameter in one.named_parameters():
            assert torch.equal(parameter, before[name][0]), name
            assert parameter.stride() == before[name][1], name
