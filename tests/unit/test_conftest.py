"""Fixtures of tests/conftest.py: uninitialised memory is NaN in eager and compiled code, and compilation works with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3, 5),
        lambda: torch.empty(3, 5, dtype=torch.bfloat16),
        lambda: torch.empty_like(torch.zeros(3, 5)),
        lambda: torch.empty_strided((3, 5), (5, 1)),
        lambda: torch.empty_permuted((3, 5), (1, 0)),
        lambda: torch.zeros(1).new_empty(3, 5),
        lambda: torch.zeros(1).new_empty_strided((3, 5), (5, 1)),
    ],
)
def test_uninitialised_floats_are_nan(allocate):
    assert allocate().isnan().all()


def test_other_dtypes_and_meta_tensors_are_left_alone():
    assert torch.empty(4, dtype=torch.int64).shape == (4,)
    assert torch.empty(4, device="meta").is_meta


def test_requires_grad_survives():
    assert torch.empty(4, requires_grad=True).requires_grad


def test_a_device_context_acts_on_layers():
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in torch.nn.Embedding(8, 8).parameters())


def test_layers_start_without_nan():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Embedding(8, 8))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_compiles_under_it(dynamic):
    def step(x):
        out = torch.empty_like(x)
        out[:] = torch.nn.functional.gelu(x @ x.T) @ x
        return out

    x = torch.randn(6, 10)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(x), step(x))


def test_the_graph_holds_no_fill():
    seen = []

    def keep(gm, example_inputs):
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    torch.compile(lambda x: torch.empty_like(x).copy_(x) + 1, backend=keep, fullgraph=True)(torch.randn(3))
    assert not [name for name in seen if "fill" in name]


def test_training_compiles_under_it():
    layer = torch.nn.Linear(6, 6)
    x = torch.randn(4, 6)
    torch.compile(layer)(x).square().sum().backward()
    got = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, layer.weight.grad)


def test_caches_are_those_of_this_run():
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent.name.startswith("rana-fx-tests-")


def test_too_many_recompiles_fail_rather_than_run_eagerly():
    compiled = torch.compile(lambda x, n: x * n, dynamic=False, backend="eager")
    with pytest.raises(Exception, match="recompile"):
        for n in range(torch._dynamo.config.recompile_limit + 2):
            compiled(torch.ones(2), n)


@given(size=st.integers(1, 4))
@settings(max_examples=3)
def test_fixtures_and_hypothesis_get_along(device, size):
    assert torch.zeros(size, device=device).device.type == device.type
