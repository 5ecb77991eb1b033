"""Storage in 8 and 4 bits: unpacked values are within half a step of the given ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.errors import BadOperand, InvalidOption, NonFinite
from rana_fx.formats import FLOATING, INT4, INT8, bits_of, format_of, gated_unit, group_of, pack, shape_of, unpack

SCALES = [torch.float32, torch.bfloat16]


@st.composite
def weights(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rows, columns = draw(st.sampled_from([1, 3, 17])), 2 * draw(st.sampled_from([1, 5, 32, 37, 64, 97]))
    magnitude = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
    weight = torch.randn(rows, columns, generator=generator) * magnitude
    weight[draw(st.integers(0, rows - 1))] = 0
    return weight, draw(st.sampled_from([4, 8])), draw(st.sampled_from([64, 128])), draw(st.sampled_from(SCALES))


@given(weights())
def test_within_half_a_step(case):
    weight, bits, group, scale_dtype = case
    stored, scale = pack(weight, bits, group, scale_dtype)
    got = unpack(stored, scale)
    assert shape_of(stored, scale) == tuple(weight.shape)
    assert bits_of(stored) == bits
    assert scale.dtype == scale_dtype
    steps = scale.float().unsqueeze(1) if bits == 8 else scale.float().repeat_interleave(group, 1)[:, : weight.shape[1]]
    # the largest number of a group is clipped where rounding made the scale smaller: by half an eps of it, times the limit
    limit = 127 if bits == 8 else 7
    allowed = steps * (0.5 + limit * torch.finfo(scale_dtype).eps) + torch.finfo(torch.float32).tiny
    assert ((got - weight).abs() <= allowed).all()
    assert (got[(weight == 0).all(1)] == 0).all()


@given(weights())
def test_packing_what_was_unpacked_changes_nothing(case):
    weight, bits, group, _ = case
    stored, scale = pack(weight, bits, group)
    # exactly representable steps, so that dividing by the limit gives the same scale again
    scale = torch.exp2(scale.clamp_min(2.0**-100).log2().round())
    again, _ = pack(unpack(stored, scale), bits, group)
    assert torch.equal(unpack(again, scale), unpack(stored, scale))


def test_two_columns_share_a_byte_even_one_low():
    stored, scale = pack(torch.tensor([[7.0, -7.0, 1.0, 0.0]]), 4)
    assert scale.tolist() == [[1.0]]
    assert stored.tolist() == [[15 | 1 << 4, 9 | 8 << 4]]


def test_group_length_follows_from_shapes():
    for group in (64, 128):
        stored, scale = pack(torch.ones(2, 200), 4, group)
        assert scale.shape == (2, -(-200 // group))
        assert group_of(stored, scale) == group


def test_floating_weights_are_only_cast():
    weight = torch.randn(2, 3, dtype=torch.float16)
    assert torch.equal(unpack(weight, None, torch.float32), weight.float())


def test_wrong_requests_are_refused():
    with pytest.raises(InvalidOption, match="bits"):
        pack(torch.ones(2, 2), 3)
    with pytest.raises(InvalidOption, match="group"):
        pack(torch.ones(2, 2), 4, 32)
    with pytest.raises(BadOperand, match="even"):
        pack(torch.ones(2, 3), 4)
    with pytest.raises(BadOperand, match="floating"):
        pack(torch.ones(2, 2, dtype=torch.int32), 8)
    with pytest.raises(NonFinite, match="2 NaN"):
        pack(torch.tensor([[1.0, float("nan"), float("inf")]]), 8)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (torch.ones(2, 4, dtype=torch.int32), None, "torch.int32"),
        (torch.ones(2, 4), torch.ones(2), "None for a floating weight"),
        (torch.ones(2, 4, dtype=torch.int8), None, r"\(2,\)"),
        (torch.ones(2, 4, dtype=torch.int8), torch.ones(3), r"\(2,\)"),
        (torch.ones(2, 100, dtype=torch.uint8), torch.ones(2, 3), r"\(2, 4\) or \(2, 2\)"),
        (torch.ones(4), None, "two dimensions"),
    ],
)
def test_weight_and_scale_that_do_not_belong_together_are_refused(weight, scale, message):
    with pytest.raises(BadOperand, match=message):
        shape_of(weight, scale)


STORED = st.sampled_from([(FLOATING, {}), (INT8, {}), (INT4, {"group": 64}), (INT4, {"group": 128})])


@given(weights(), STORED)
def test_packed_numbers_are_within_the_bound_of_the_format(case, stored):
    weight, _, _, scale_dtype = case
    kind, options = stored
    matrix = kind.pack(weight, scale_dtype=scale_dtype, **options)
    assert matrix.shape == tuple(weight.shape) and format_of(matrix.values) is kind
    got = matrix.dequantize()
    assert ((got - weight).abs() <= kind.error_bound(matrix)).all()
    assert torch.equal(got, unpack(matrix.values, matrix.scale))
    # bounds are tight: at most a step at the largest number of the row, the format's limit
    limit = {"floating": torch.inf, "int8": 127, "int4": 7}[kind.name]
    assert (kind.error_bound(matrix) <= weight.abs().amax(1, keepdim=True) / limit + torch.finfo(torch.float32).tiny).all()


@given(weights(), STORED, st.data())
def test_a_part_holds_the_numbers_of_the_part(case, stored, data):
    weight, (kind, options) = case[0], stored
    matrix = kind.pack(weight, **options)
    whole, columns = matrix.dequantize(), weight.shape[1]
    unit = matrix.format.unit(matrix) if kind is INT4 else 1
    start = unit * data.draw(st.integers(0, (columns - 1) // unit))
    stop = data.draw(st.sampled_from(sorted({*range(start + unit, columns + 1, unit), columns})))
    part = matrix.narrow(1, start, stop - start)
    assert kind.divisible(matrix, start, stop) and part.shape == (len(weight), stop - start)
    assert torch.equal(part.dequantize(), whole[:, start:stop])
    first = data.draw(st.integers(0, len(weight) - 1))
    rows = matrix.narrow(0, first, len(weight) - first)
    assert torch.equal(rows.dequantize(), whole[first:])
    assert rows.bytes_per_row == matrix.bytes_per_row and rows.flops_per_row == columns


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (32, 64), (2, 128), (64, 130)])
def test_columns_inside_a_group_are_no_matrix(start, stop):
    matrix = INT4.pack(torch.randn(2, 200))
    assert not INT4.divisible(matrix, start, stop)
    with pytest.raises(BadOperand, match=f"columns is {start} to {stop}: expected whole units of 64 columns"):
        matrix.narrow(1, start, stop - start)


@pytest.mark.parametrize(
    ("kind", "bytes_per_row", "unit", "gated"), [(FLOATING, 400, 1, 2), (INT8, 104, 4, 8), (INT4, 58, 64, 128)]
)
def test_sizes_by_hand(kind, bytes_per_row, unit, gated):
    matrix = kind.pack(torch.randn(3, 100))
    assert (matrix.bytes_per_row, matrix.flops_per_row) == (bytes_per_row, 100)
    assert kind.unit(matrix) == unit and gated_unit(matrix.values, matrix.scale) == gated
    assert kind.columns(matrix.values.shape[1]) == 100


def test_only_plain_numbers_are_cast():
    for kind in (FLOATING, INT8, INT4):
        matrix = kind.pack(torch.randn(3, 64))
        cast = matrix.to(torch.bfloat16, "cpu")
        assert cast.dtype == (torch.bfloat16 if kind is FLOATING else matrix.dtype)
        assert kind is FLOATING or (torch.equal(cast.values, matrix.values) and cast.scale.dtype == torch.float32)
