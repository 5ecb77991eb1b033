"""Plans in 8 and 4 bits through the rewrite and the compiler: what is computed is what is stored, wherever it is stored."""

from __future__ import annotations

import copy

import pytest
import torch

import rana_fx
from rana_fx.calibrate import call
from rana_fx.measure import measuring
from tests.architectures import output
from tests.storages import STORAGES, sites_of, stored_matrix, stored_plan


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def unpacked(model, batch, plan):
    """The dense model in fp64 with the matrices that the plan stands for."""
    twin = copy.deepcopy(model)
    sites = sites_of(twin, batch)
    with torch.no_grad():
        for adapter in plan.adapters:
            parts = stored_matrix(adapter).split([sites[name].out_features for name in adapter.sites])
            for name, part in zip(adapter.sites, parts, strict=True):
                sites[name].view.copy_(part)
    return twin.double()


def wide(batch):
    return torch.utils._pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, batch)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "bert", "phi3"])
@pytest.mark.parametrize("storage", STORAGES)
def test_everything_kept_is_the_matrix_that_is_stored(name, storage):
    model, batch, plan = stored_plan(name, 1, storage)
    with torch.no_grad():
        expected = output(call(unpacked(model, batch, plan), wide(batch)))
    rana_fx.attach(model, plan)
    with measuring(model) as meter:
        got = output(meter.run(batch))
    # fp32 against fp64: the oracle holds W^ rounded to fp32
    assert relative(got, expected) < 1e-5
    with torch.no_grad():
        assert relative(output(call(torch.compile(model, backend=rana_fx.backend), batch)), expected) < 1e-5
    measured = meter.result()
    assert set(measured.density.values()) == {1.0}
    assert measured.budget_bytes == pytest.approx(plan.expected_budget("bytes"))
