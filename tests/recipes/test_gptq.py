"""Rounding with error feedback has less output error than rounding to nearest, in the same format."""

from __future__ import annotations

import pytest
import torch

from rana_fx.formats import pack, unpack
from rana_fx.recipes.rana.gptq import quantize


def correlated(rows, width, generator):
    mix = torch.randn(width, width // 4, generator=torch.Generator().manual_seed(1))
    return torch.randn(rows, width // 4, generator=generator) @ mix.t() + 0.3 * torch.randn(rows, width, generator=generator)


@pytest.mark.parametrize(("width", "out"), [(96, 128), (300, 70), (64, 192)])
def test_output_error_is_less_than_that_of_rounding_to_nearest(width, out):
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(width, out, generator=generator)
    x = correlated(4 * width, width, generator)
    found = quantize(weight, 4, x.t() @ x / len(x))
    plain = unpack(*pack(weight, 4, scale_dtype=torch.bfloat16))
    fresh = correlated(2000, width, generator)

    def error(made):
        return float((fresh @ (made - weight)).square().mean())

    assert found.dequantize().shape == weight.shape
    assert error(found.dequantize()) < 0.75 * error(plain)
    clipped = quantize(weight, 4)
    assert float((clipped.dequantize() - weight).square().mean()) < float((plain - weight).square().mean())


@pytest.mark.parametrize("bits", [8, 4])
def test_first_rows_and_columns_are_those_of_the_whole(bits):
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    found = quantize(weight, bits)
    whole = found.dequantize()
    torch.testing.assert_close(found.rows(13).dequantize(), whole[:13], rtol=0, atol=0)
    torch.testing.assert_close(found.columns(132).dequantize(), whole[:, :132], rtol=0, atol=0)
    assert float((whole - weight).abs().max()) <= float(weight.abs().max()) / (127 if bits == 8 else 5)


def test_a_zero_group_is_stored_as_zeros():
    weight = torch.zeros(4, 128)
    weight[:, 64:] = 1
    found = quantize(weight, 4, torch.eye(4)).dequantize()
    assert torch.equal(found[:, :64], weight[:, :64])
    torch.testing.assert_close(found[:, 64:], weight[:, 64:], rtol=0.01, atol=0)


def test_all_sixteen_numbers_are_used():
    """The largest number of an asymmetric group is at -8 steps, for either sign."""
    weight = torch.linspace(-1, 0.875, 64)
    for side in (weight, -weight):
        found = quantize(side.expand(3, 64).contiguous(), 4)
        assert set(torch.cat([found.matrix & 0xF, found.matrix >> 4]).unique().tolist()) == set(range(16))
        assert bool((found.scale.float() * side[0] < 0).all())
        # bfloat16 represents an eighth
        assert float((found.dequantize() - side).abs().max()) <= 1 / 16 + 1e-6


def test_what_is_rounded_first_does_not_depend_on_the_order_of_rows():
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(96, 64, generator=generator), correlated(400, 96, generator)
    x *= torch.linspace(0.2, 3, 96)
    order = torch.randperm(96, generator=generator)
    moment = (x.double().t() @ x.double() / len(x)).float()
    straight, shuffled = quantize(weight, 4, moment), quantize(weight[order], 4, moment[order][:, order])
    torch.testing.assert_close(shuffled.dequantize(), straight.dequantize()[order], rtol=0, atol=0)
