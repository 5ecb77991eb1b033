"""``decode_attention``: the operation, its reference and the C++ template against fp64, and rows that attend to nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rana_fx.kernels.attention import decode_attention, decode_attention_reference
from tests.support.attention import MASKS, attention, attentions
from tests.support.inductor import FALLBACK, check_threads_change_no_bit, compiled, each, poisoned
from tests.support.products import DTYPES

MARKER = "// rana_decode_attention"


@given(attentions())
def test_eager_and_reference(drawn):
    drawn.check(decode_attention(*drawn.operands))
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in drawn.operands[:4]]
    wide = decode_attention_reference(*exact, drawn.scale)
    torch.testing.assert_close(decode_attention_reference(*drawn.operands).double(), wide, rtol=0.02, atol=0.02)


@settings(max_examples=6)
@given(st.lists(attentions(), min_size=6, max_size=6))
def test_template(drawn):
    with poisoned(), torch.no_grad():
        results, code = each(decode_attention, [one.operands for one in drawn])
    assert MARKER in code and FALLBACK not in code
    for one, y in zip(drawn, results, strict=True):
        one.check(y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mask_and_a_long_cache(dtype):
    cases = [attention(2, 3, 3, 1, 700, 64, dtype=dtype, mask=mask) for mask in MASKS]
    cases += [
        attention(1, 2, 4, 16, 130, 256, dtype=dtype, mask="prefix"),
        attention(3, 8, 1, 1, 4100, 16, dtype=dtype, mask="some"),
    ]
    with poisoned(), torch.no_grad():
        results, code = each(decode_attention, [one.operands for one in cases])
    assert FALLBACK not in code
    for one, y in zip(cases, results, strict=True):
        one.check(y)


def test_threads_change_no_bit():
    cases = [attention(1, 3, 3, 1, 1030, 64, mask=mask) for mask in ("none", "prefix")] + [
        attention(2, 1, 5, 7, 513, 24, mask="some")
    ]
    with torch.no_grad():
        for one, y in zip(
            cases, check_threads_change_no_bit(decode_attention, [case.operands for case in cases], MARKER), strict=True
        ):
            one.check(y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_attend_to_nothing_are_zero_as_in_pytorch(dtype):
    cases = [attention(1, 2, 2, 3, 70, 16, dtype=dtype, mask=mask) for mask in ("nothing", "one row of nothing")]
    one = attention(1, 2, 2, 3, 70, 16, dtype=dtype)
    cases.append(type(one)(one.q, one.k, one.v, torch.full((3, 70), -math.inf, dtype=dtype), one.scale))
    with torch.no_grad():
        results, _ = each(decode_attention, [case.operands for case in cases])
    for case, y in zip(cases, results, strict=True):
        q, k, v, mask, scale = case.operands
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.expand(1, 4, 3, 70), scale=scale, enable_gqa=True)
        for found in (y, theirs, decode_attention(*case.operands), decode_attention_reference(*case.operands)):
            assert torch.equal(found[:, :, 0], torch.zeros_like(found[:, :, 0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_values_that_are_not_finite(operand, value):
    one = attention(1, 2, 2, 2, 130, 16, mask="prefix")
    tensor = getattr(one, operand)
    tensor[0, 1, 0, 3] = value  # position 0, to which every row attends
    with torch.no_grad():
        y, code = compiled(decode_attention, *one.operands)
    assert MARKER in code
    expected = decode_attention_reference(*one.operands)
    assert not expected.isfinite().all()
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_positions_that_no_row_attends_to_are_not_read():
    one = attention(1, 2, 2, 1, 256, 16)
    mask = torch.arange(256) < 64
    one.k[:, :, 64:] = math.nan
    one.v[:, :, 64:] = math.nan
    with torch.no_grad():
        y, _ = compiled(decode_attention, *one.operands[:3], mask, one.scale)
    torch.testing.assert_close(y, decode_attention_reference(one.q, one.k[:, :, :64], one.v[:, :, :64], None, one.scale))


@pytest.mark.parametrize("mask", ["none", "prefix", "added"])
def test_opcheck(mask):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(decode_attention, attention(2, 2, 2, 3, 10, 8, dtype=dtype, mask=mask).operands)


def test_shapes_that_do_not_fit():
    q, k, v = (torch.empty(sizes, device="meta") for sizes in ((1, 6, 2, 8), (1, 4, 5, 8), (1, 4, 5, 8)))
    with pytest.raises(RuntimeError, match="H a multiple of G"):
        decode_attention(q, k, v)
    with pytest.raises(RuntimeError, match=r"expected \(B, H, T, D\), \(B, G, S, D\), \(B, G, S, E\)"):
        decode_attention(q[:, :4], k, v[:, :, :3])
    with pytest.raises(RuntimeError, match="expected one dtype"):
        decode_attention(q[:, :4], k, v.double())
    with pytest.raises(RuntimeError):
        decode_attention(q[:, :4], k, v, torch.empty(2, 7, device="meta"))


@pytest.mark.parametrize("sizes", [(1, 2, 1, 17, 40, 16), (1, 1, 1, 1, 40, 264)])
def test_sizes_beyond_the_template(sizes):
    one = attention(*sizes)
    with torch.no_grad():
        y, code = compiled(decode_attention, *one.operands)
    assert MARKER not in code and FALLBACK in code
    one.check(y)


def test_fp64_and_a_varying_number_of_positions():
    def grown(q, k, v, mask):
        return decode_attention(q, k, v, mask, 0.3)

    one = attention(1, 2, 2, 1, 40, 16, mask="prefix")
    with torch.no_grad():
        y, code = compiled(grown, *(x.double() for x in one.operands[:3]), one.mask)
        assert MARKER not in code
        torch.testing.assert_close(y, grown(*(x.double() for x in one.operands[:3]), one.mask))
        y, code = compiled(grown, *one.operands[:4], dynamic=True)
        torch.testing.assert_close(y, grown(*one.operands[:4]))
