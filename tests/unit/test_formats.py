"""Storage in 8 and 4 bits: what is stored is what unpack says, within half a step of what was given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.errors import BadOperand, InvalidOption, NonFinite
from rana_fx.formats import bits_of, group_of, pack, shape_of, unpack

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
