"""The kernel of masked_rows against fp64; it reads only kept rows. Interpreted without a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from rana_fx.errors import BadOperand
from rana_fx.kernels.triton.masked_rows import default_config, masked_rows
from rana_fx.kernels.triton.router import RouterConfig
from tests.support.products import Rows, kernels_run_on, masked_by, row_products

CONFIGS = st.builds(
    RouterConfig,
    block_r=st.sampled_from([1, 4, 16]),
    block_d=st.sampled_from([16, 64, 128]),
    warps=st.just(4),
    stages=st.sampled_from([1, 3]),
)


@pytest.fixture(autouse=True)
def _kernels_run(device):
    kernels_run_on(device)


def case(tokens, rows, width, density, device, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((tokens, width), (rows, width)))
    a, bias = masked_by(density, tokens, rows, generator=generator), torch.randn(rows, generator=generator)
    return Rows(*(value.to(dtype) for value in (x, a, weight, bias))).to(device)


@settings(max_examples=30)
@given(data=st.data())
def test_matches_fp64(device, data):
    rows, config = data.draw(row_products()).to(device), data.draw(CONFIGS)
    h = masked_rows(*rows.poisoned().operands, config=config)
    rows.check(h)
    assert torch.equal(h, masked_rows(*rows.operands, config=config))


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_default_config(device, tokens, density):
    rows = case(tokens, 97, 131, density, device)
    rows.check(masked_rows(*rows.poisoned().operands))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_one_token_drops_does_not_reach_the_others(device, value):
    """A row is kept by one token and dropped by the other, whose input may have any value."""
    rows = case(2, 31, 16, 1.0, device)
    rows.a[1, ::2] = 0
    rows.x[1] = value
    with np.errstate(invalid="ignore"):
        h = masked_rows(*rows.operands)
    assert bool((h[1, ::2] == 0).all()) and not bool(h[1, 1::2].isfinite().any())
    Rows(rows.x[:1], rows.a[:1], rows.weight, rows.bias).check(h[:1])


def test_leading_dimensions_are_those_of_the_gate(device):
    """The output for flattened tokens has the shape of the gate."""
    rows = case(6, 13, 16, 0.5, device)
    h = masked_rows(rows.x.view(3, 2, 16), rows.a.view(1, 6, 13), rows.weight, rows.bias)
    assert h.shape == (1, 6, 13)
    rows.check(h[0])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_reads_kept_rows_alone(device, monkeypatch, tokens, density):
    if device.type == "cuda":
        pytest.skip("loads are counted by the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    rows, read = case(tokens, 97, 130, density, device), []
    begin = rows.weight.data_ptr()
    end, load = begin + rows.weight.nbytes, InterpreterBuilder.create_masked_load

    def counted(self, pointers, mask, *rest):
        inside = (pointers.data >= begin) & (pointers.data < end) & mask.data
        read.append(int(np.sum(inside)))
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    # several rows a program: some of them kept, some dropped
    rows.check(masked_rows(*rows.operands, config=RouterConfig(4, 64)))
    assert sum(read) == int(rows.kept.sum()) * 130


def test_programs_fill_the_gpu_and_rows_are_whole_loads():
    wide = default_config(11008, 4096)
    assert wide.block_r * 4 * 132 <= 11008 and wide.block_d * 2 == 512 * wide.warps
    assert default_config(500, 4096).block_r == 1
    assert default_config(500, 3).block_d == 16


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("x", ((1, 4), (1, 3), (3, 5))),
        ("x", ((17, 5), (17, 3), (3, 5))),
        ("a", ((2, 5), (2, 4), (3, 5))),
        ("a", ((2, 5), (1, 3), (3, 5))),
        ("bias", ((2, 5), (2, 3), (3, 5), (4,))),
        ("weight", ((2, 5), (2, 3), (3, 5, 1))),
    ],
)
def test_wrong_operands_are_refused(device, name, shapes):
    with pytest.raises(BadOperand) as error:
        masked_rows(*(torch.ones(shape, device=device) for shape in shapes))
    assert error.value.facts["name"] == name
