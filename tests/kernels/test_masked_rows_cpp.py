"""The C++ template of masked_rows through Inductor: numerics, skipped rows, fusions, and cases that it declines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rana_fx.kernels.cpp.masked_rows import MaskedRowsTemplate
from rana_fx.kernels.cpp.template import MAX_TOKENS
from rana_fx.kernels.ops import masked_gemv, masked_rows
from tests.support.inductor import GEMV, ROWS, calls, compiled, each, poisoned
from tests.support.products import SIZES, Product, Rows, masked_by, row_products

SPARSE = 0.01  # a density at which the template is expected to be faster, for any number of tokens


def case(tokens, rows, width, *, density=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((tokens, width), (rows, width)))
    a, bias = masked_by(density, tokens, rows, generator=generator), torch.randn(rows, generator=generator)
    return Rows(*(value.to(dtype) for value in (x, a, weight / width**0.5, bias)))


@settings(max_examples=3)
@given(data=st.data())
def test_matches_fp64(data):
    """Any strides; a weight with rows that are not contiguous is multiplied by a dense matmul."""
    # four in a graph: three graphs are compiled instead of twelve
    cases = [data.draw(row_products(tokens=(1, 2, 5, MAX_TOKENS), rows=[*SIZES, 530])) for _ in range(4)]
    with poisoned():
        results, code = each(masked_rows, [(*rows.poisoned().operands, SPARSE) for rows in cases])
    assert "torch.ops.rana" not in code
    assert calls(code, ROWS) == sum(rows.weight.stride(1) == 1 for rows in cases)
    for rows, h in zip(cases, results, strict=True):
        rows.check(h)


@pytest.mark.parametrize("tokens", [1, 3])
def test_dropped_rows_are_not_multiplied(monkeypatch, tokens):
    """A NaN in a dropped row would reach the result if the row were multiplied."""
    selection = "a != 0.0f ? a * (up{{bias}}) : 0.0f"
    assert MaskedRowsTemplate.body.count(selection) == 1
    monkeypatch.setattr(MaskedRowsTemplate, "body", MaskedRowsTemplate.body.replace(selection, "a * (up{{bias}})"))
    rows = case(tokens, 203, 61)
    assert 0 < int(rows.kept.sum()) < 203
    with poisoned():
        h, code = compiled(masked_rows, *rows.poisoned().operands, SPARSE)
    assert ROWS in code
    rows.check(h)


def test_threads_change_no_bit():
    rows = case(3, 1001, 250)
    results = []
    for threads in (1, 3):
        with torch._inductor.config.patch({"cpp.threads": threads}):
            h, code = compiled(masked_rows, *rows.operands, SPARSE)
        assert f"num_threads({threads})" in code
        results += [h, torch.compile(masked_rows)(*rows.operands, SPARSE)]
    assert all(torch.equal(results[0], other) for other in results[1:])
    rows.check(results[0])


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
    assert (code.count(ROWS), code.count(GEMV), code.count("torch.ops.rana")) == (1, 1, 0)
    rows.check(h[0])
    Product(h[0], tau, down, None, None).check(y[0])


@pytest.mark.parametrize(
    ("tokens", "density", "dtype"), [(MAX_TOKENS + 1, SPARSE, torch.float32), (2, 0.9, torch.bfloat16), (8, 0.9, torch.float32)]
)
def test_steps_aside(tokens, density, dtype):
    """More tokens, or masks that keep too much: a dense matmul, rounded before and after the multiplication by the gate."""
    rows = case(tokens, 31, 64, density=density, dtype=dtype)
    h, code = compiled(masked_rows, *rows.poisoned().operands, density)
    assert ROWS not in code and "torch.ops.rana" not in code
    assert bool((h[rows.a == 0] == 0).all())
    exact = torch.where(rows.a != 0, rows.a.double() * (rows.x.double() @ rows.weight.double().t() + rows.bias.double()), 0.0)
    # one rounding of the product, one with the bias and one of the result, and fp32 sums
    assert float((h.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps + 1e-6


def test_a_varying_number_of_tokens_is_a_matrix_product():
    function = torch.compile(masked_rows, dynamic=True)
    for tokens in (3, 12):
        rows = case(tokens, 31, 64)
        rows.check(function(*rows.operands))
