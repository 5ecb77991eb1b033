"""rana::masked_rows: numerics by each implementation, rows that are not read, and what the template and the launch are specific
about."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.errors import BadOperand
from rana_fx.kernels.cpp.masked_rows import MaskedRowsTemplate
from rana_fx.kernels.cpp.template import MAX_TOKENS
from rana_fx.kernels.ops import implementation, masked_gemv, masked_rows
from tests.support.implementations import EVERY, FEW, computed, kernels, runs_again
from tests.support.inductor import FALLBACK, GEMV, ROWS, calls, check_threads_change_no_bit, compiled, each, poisoned
from tests.support.products import SIZES, Product, Rows, masked_by, row_products

SPARSE = 0.01  # a density at which the template is expected to be faster, for any number of tokens
INTERPRETED = [1, 2, 3, 7, 16, 31]  # a program is a row: the interpreter's time grows with them
AT_ONCE = {"reference": 25, "cpp": 8, "triton": 30}
CONFIGS = st.fixed_dictionaries(
    {
        "block_r": st.sampled_from([1, 4, 16]),
        "block_d": st.sampled_from([16, 64, 128]),
        "warps": st.just(4),
        "stages": st.sampled_from([1, 3]),
    }
)


def case(tokens, rows, width, *, density=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((tokens, width), (rows, width)))
    a, bias = masked_by(density, tokens, rows, generator=generator), torch.randn(rows, generator=generator)
    return Rows(*(value.to(dtype) for value in (x, a, weight / width**0.5, bias)))


# ---- every implementation


def by_reference(cases, device, data):
    with implementation("reference"):
        for rows in cases:
            rows.check_each(masked_rows(*rows.poisoned().operands))


def by_cpp(cases, device, data):
    """A weight with rows that are not contiguous is multiplied by a dense matmul."""
    with poisoned():
        results, code = each(masked_rows, [(*rows.poisoned().operands, SPARSE) for rows in cases])
    assert FALLBACK not in code
    assert calls(code, ROWS) == sum(rows.weight.stride(1) == 1 for rows in cases)
    for rows, h in zip(cases, results, strict=True):
        rows.check(h)


def by_triton(cases, device, data):
    """In any config."""
    launch, make = kernels("masked_rows", device).masked_rows, kernels("router", device).RouterConfig
    for rows in cases:
        config = make(**data.draw(CONFIGS))
        h = launch(*rows.poisoned().operands, config=config)
        rows.check(h)
        if runs_again(rows, cases, device):
            assert torch.equal(h, launch(*rows.operands, config=config))


@EVERY
@FEW
@given(data=st.data())
def test_matches_fp64(who, device, data):
    rows = {"reference": SIZES, "cpp": [*SIZES, 530], "triton": INTERPRETED if device.type == "cpu" else SIZES}[who]
    drawn = row_products(tokens=(1, 2, 5, MAX_TOKENS) if who == "cpp" else (1, 2, 3, 4, 5, 16), rows=rows)
    cases = [data.draw(drawn).to(device) for _ in range(AT_ONCE[who])]
    {"reference": by_reference, "cpp": by_cpp, "triton": by_triton}[who](cases, device, data)


@EVERY
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_one_token_drops_does_not_reach_the_others(who, device, value):
    """A row is kept by one token and dropped by the other, whose input may have any value."""
    rows = case(2, 31, 16, density=1.0).to(device)
    rows.a[1, ::2] = 0
    rows.x[1] = value
    with np.errstate(invalid="ignore"):
        (h,) = computed(who, masked_rows, [(*rows.operands, SPARSE)], ROWS, device)
    assert bool((h[1, ::2] == 0).all()) and not bool(h[1, 1::2].isfinite().any())
    Rows(rows.x[:1], rows.a[:1], rows.weight, rows.bias).check(h[:1])


@EVERY
def test_leading_dimensions_are_those_of_the_gate(who, device):
    """The output for flattened tokens has the shape of the gate."""
    rows = case(6, 13, 16).to(device)
    operands = rows.x.view(3, 2, 16), rows.a.view(1, 6, 13), rows.weight, rows.bias, SPARSE
    (h,) = computed(who, masked_rows, [operands], ROWS, device)
    assert h.shape == (1, 6, 13)
    rows.check(h[0])


# ---- C++: rows that are not multiplied, threads, fusions, and cases that are declined


def test_dropped_rows_are_not_multiplied(monkeypatch):
    """A NaN in a dropped row would reach the result if the row were multiplied."""
    selection = "a != 0.0f ? a * (up{{bias}}) : 0.0f"
    assert MaskedRowsTemplate.body.count(selection) == 1
    monkeypatch.setattr(MaskedRowsTemplate, "body", MaskedRowsTemplate.body.replace(selection, "a * (up{{bias}})"))
    cases = [case(tokens, 203, 61) for tokens in (1, 3)]
    assert all(0 < int(rows.kept.sum()) < 203 for rows in cases)
    with poisoned():
        results, code = each(masked_rows, [(*rows.poisoned().operands, SPARSE) for rows in cases])
    assert calls(code, ROWS) == len(cases)
    for rows, h in zip(cases, results, strict=True):
        rows.check(h)


def test_threads_change_no_bit():
    rows = case(3, 1001, 250)
    (h,) = check_threads_change_no_bit(masked_rows, [(*rows.operands, SPARSE)], ROWS)
    rows.check(h)


def test_cast_and_users_are_in_the_same_kernel():
    rows = case(1, 61, 128, dtype=torch.bfloat16)
    with poisoned():
        h, code = compiled(lambda *args: masked_rows(*args) * 2, *rows.operands, SPARSE)
    assert code.count(ROWS) == code.count('extern "C"') == 1
    Rows(rows.x, 2 * rows.a, rows.weight, rows.bias).check(h)


def test_up_and_down_of_a_gated_mlp():
    """Both skip neurons that the gate drops; the gate has one more dimension than x."""
    rows, tau = case(2, 61, 128), torch.full((61,), torch.finfo(torch.float32).tiny)
    down = torch.randn(61, 30) / 8
    (h, y), code = compiled(
        lambda x, a, w, b, d: (h := masked_rows(x, a[None], w, b, SPARSE), masked_gemv(h, tau, d)), *rows.operands, down
    )
    assert (code.count(ROWS), code.count(GEMV), code.count(FALLBACK)) == (1, 1, 0)
    rows.check(h[0])
    Product(h[0], tau, down, None, None).check(y[0])


def test_steps_aside():
    """More tokens, or masks that keep too much: a dense matmul, rounded before and after the multiplication by the gate."""
    kinds = [(MAX_TOKENS + 1, SPARSE, torch.float32), (2, 0.9, torch.bfloat16), (8, 0.9, torch.float32)]
    cases = [case(tokens, 31, 64, density=density, dtype=dtype) for tokens, density, dtype in kinds]
    operands = [(*rows.poisoned().operands, density) for rows, (_, density, _) in zip(cases, kinds, strict=True)]
    results, code = each(masked_rows, operands)
    assert ROWS not in code and FALLBACK not in code
    for rows, h in zip(cases, results, strict=True):
        assert bool((h[rows.a == 0] == 0).all())
        product = rows.x.double() @ rows.weight.double().t() + rows.bias.double()
        exact = torch.where(rows.a != 0, rows.a.double() * product, 0.0)
        # one rounding of the product, one with the bias and one of the result, and fp32 sums
        assert float((h.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(h.dtype).eps + 1e-6


def test_a_varying_number_of_tokens_is_a_matrix_product():
    function = torch.compile(masked_rows, dynamic=True)
    for tokens in (3, 12):
        rows = case(tokens, 31, 64)
        rows.check(function(*rows.operands))


# ---- Triton: defaults, rows that are not read, and operands that are refused


@pytest.fixture
def launch(device):
    return kernels("masked_rows", device).masked_rows


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_default_config(launch, device, tokens, density):
    rows = case(tokens, 31, 131, density=density).to(device)
    rows.check(launch(*rows.poisoned().operands))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_reads_kept_rows_alone(launch, device, monkeypatch, tokens, density):
    if device.type == "cuda":
        pytest.skip("loads are counted by the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    rows, read = case(tokens, 97, 130, density=density).to(device), []
    begin = rows.weight.data_ptr()
    end, load = begin + rows.weight.nbytes, InterpreterBuilder.create_masked_load

    def counted(self, pointers, mask, *rest):
        inside = (pointers.data >= begin) & (pointers.data < end) & mask.data
        read.append(int(np.sum(inside)))
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    # several rows a program: some of them kept, some dropped
    rows.check(launch(*rows.operands, config=kernels("router", device).RouterConfig(4, 64)))
    assert sum(read) == int(rows.kept.sum()) * 130


def test_programs_fill_the_gpu_and_rows_are_whole_loads():
    pytest.importorskip("triton")
    from rana_fx.kernels.triton.masked_rows import default_config

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
def test_wrong_operands_are_refused(launch, device, name, shapes):
    with pytest.raises(BadOperand) as error:
        launch(*(torch.ones(shape, device=device) for shape in shapes))
    assert error.value.facts["name"] == name
