"""The masked product's kernel against fp64, in every storage, with ranks listed in every way. Interpreted without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from rana_fx.errors import BadOperand, InvalidOption
from rana_fx.kernels.config import Config
from rana_fx.kernels.masked_gemv import masked_gemv, partials
from tests.kernels.products import Product, kernels_run_on, products

CONFIGS = st.builds(
    Config,
    splits=st.sampled_from([1, 2, 5]),
    block_n=st.sampled_from([32, 128]),
    block_m=st.sampled_from([4, 16]),
    warps=st.just(4),
    stages=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 4, 16]),
    source=st.sampled_from(["scratch", "registers"]),
)


@pytest.fixture(autouse=True)
def _kernels_run(device):
    kernels_run_on(device)


def with_source(config, source):
    return Config(**{**vars(config), "source": source})


def check(case, config):
    y = masked_gemv(case.v, case.tau, case.weight, case.bias, case.scale, config=config)
    case.check(y)
    again = masked_gemv(case.v, case.tau, case.weight, case.bias, case.scale, config=config)
    assert torch.equal(y, again)


@pytest.mark.parametrize("bits", [16, 8, 4])
class TestEveryStorage:
    @given(data=st.data())
    def test_matches_fp64(self, device, bits, data):
        check(data.draw(products(bits=bits)).to(device), data.draw(CONFIGS))

    def test_default_config(self, device, bits):
        generator = torch.Generator().manual_seed(bits)
        weight, scale = torch.randn(97, 66, generator=generator), None
        if bits < 16:
            from rana_fx.kernels.quantize import pack

            weight, scale = pack(weight, bits)
        v = torch.randn(2, 1, 97, generator=generator)
        case = Product(v, torch.full((97,), 0.5), weight, scale, None).to(device)
        case.check(masked_gemv(case.v, case.tau, case.weight, None, case.scale))


@given(data=st.data())
def test_both_ways_to_list_ranks_give_the_same_bits(device, data):
    case, config = data.draw(products(tokens=(1, 3))).to(device), data.draw(CONFIGS)
    got = [partials(case.v, case.tau, case.weight, config=with_source(config, s)) for s in ("scratch", "registers")]
    assert torch.equal(*got)


def test_partials_sum_to_the_product(device):
    generator = torch.Generator().manual_seed(0)
    case = Product(torch.randn(3, 31, generator=generator), torch.full((31,), 0.3), torch.randn(31, 7), None, None).to(device)
    got = partials(case.v, case.tau, case.weight, config=Config(splits=4, group=1))
    assert got.shape == (4, 3, 7)
    assert got.dtype == torch.float32
    case.check(got.sum(0))


def test_slices_without_ranks_leave_zeros(device):
    v, tau, weight = (torch.ones(shape, device=device) for shape in ((1, 3), (3,), (3, 5)))
    got = partials(v, tau, weight, config=Config(splits=5, group=4))
    assert torch.equal(got[1:], torch.zeros_like(got[1:]))
    assert torch.equal(got.sum(0), torch.full_like(got[0], 3.0))


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_what_is_dropped_does_not_spread(device, tokens):
    v = torch.tensor([[math.inf, 1.0, math.nan, -2.0]]).expand(tokens, 4).to(device)
    tau = torch.tensor([math.nan, 0.0, 0.0, 4.0], device=device)
    y = masked_gemv(v, tau, torch.ones(4, 3, device=device), config=Config(splits=2, group=1))
    assert torch.equal(y, torch.full((tokens, 3), -1.0, device=device))


def test_half_precision_squares_do_not_overflow(device):
    v = torch.tensor([[300.0, 1e-4]], dtype=torch.float16, device=device)
    y = masked_gemv(v, torch.tensor([80_000.0, 5e-9], device=device), torch.eye(2, dtype=torch.float16, device=device))
    assert torch.equal(y, v)


def test_many_ranks(device):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 65_536, generator=generator)
    case = Product(v, torch.full((65_536,), 9.0), torch.randn(65_536, 3, generator=generator), None, None).to(device)
    case.check(masked_gemv(case.v, case.tau, case.weight))


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (((1, 4), (4,), (5, 3)), "v"),
        (((1, 5), (4,), (5, 3)), "tau"),
        (((17, 5), (5,), (5, 3)), "v"),
        (((1, 5), (5,), (5,)), "weight"),
    ],
)
def test_wrong_operands_are_refused(device, shapes, name):
    v, tau, weight = (torch.ones(shape, device=device) for shape in shapes)
    with pytest.raises(BadOperand) as error:
        masked_gemv(v, tau, weight)
    assert error.value.facts["name"] == name


def test_wrong_bias_and_source_are_refused(device):
    v, tau, weight = (torch.ones(shape, device=device) for shape in ((1, 3), (3,), (3, 5)))
    with pytest.raises(BadOperand, match="bias"):
        masked_gemv(v, tau, weight, torch.ones(4, device=device))
    with pytest.raises(InvalidOption, match="scratch"):
        masked_gemv(v, tau, weight, config=Config(splits=1, source="disk"))
