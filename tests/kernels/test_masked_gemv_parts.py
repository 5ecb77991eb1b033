"""rana::masked_gemv_parts: matmuls of one tensor with different masks; by Triton in one launch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.errors import BadOperand
from rana_fx.kernels.ops import implementation, masked_gemv_parts
from rana_fx.kernels.triton.config import Config
from tests.support.implementations import EAGER, FEW, kernels, runs_again
from tests.support.products import DTYPES, assert_close, assert_each_close

CONFIGS = st.builds(
    Config,
    splits=st.sampled_from([1, 3]),
    block_n=st.sampled_from([64, 128]),
    block_m=st.sampled_from([1, 8]),
    warps=st.sampled_from([1, 2]),
    early=st.sampled_from([0, 8]),
)


def drawn(data, device):
    """v, thresholds, weights, biases: masks that keep none, some or all; two or three weights."""
    dtype, tokens = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([1, 2, 5]))
    ranks = data.draw(st.integers(1, 97))
    sizes = data.draw(st.lists(st.sampled_from([1, 64, 67, 130]), min_size=2, max_size=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))

    def randn(*size):
        return torch.randn(size, generator=generator).to(dtype).to(device)

    v, weights = randn(tokens, ranks), [randn(ranks, size) for size in sizes]
    taus = [torch.full((ranks,), data.draw(st.sampled_from([0.0, 0.5, torch.inf])), device=device) for _ in sizes]
    return v, taus, weights, [randn(size) for size in sizes] if data.draw(st.booleans()) else []


def check(compare, y, v, taus, weights, biases):
    assert y.dtype == v.dtype
    parts = y.split([weight.shape[1] for weight in weights], -1)
    for index, (got, tau, weight) in enumerate(zip(parts, taus, weights, strict=True)):
        kept = torch.where(v.float().square() >= tau, v.double(), 0)
        exact, magnitude = kept @ weight.double(), kept.abs() @ weight.double().abs()
        if biases:
            exact, magnitude = exact + biases[index].double(), magnitude + biases[index].double().abs()
        compare("y", got, exact, magnitude, terms=v.shape[-1] + 1)


@EAGER
@FEW
@given(data=st.data())
def test_matches_fp64(who, device, data):
    cases = [drawn(data, device) for _ in range(20)]
    for operands in cases:
        if who == "reference":
            with implementation(who):
                check(assert_each_close, masked_gemv_parts(*operands, 0.5), *operands)
            continue
        launch, config = kernels("masked_gemv_concat", device).masked_gemv_parts, data.draw(st.none() | CONFIGS)
        y = launch(*operands, config=config)
        check(assert_close, y, *operands)
        if runs_again(operands, cases, device):
            assert torch.equal(y, launch(*operands, config=config))


def test_rows_may_lie_apart(device):
    wide = torch.randn(40, 256, device=device)
    v, taus, weights = torch.randn(1, 1, 40, device=device), [torch.zeros(40, device=device)] * 2, [wide[:, :64], wide[:, 128:]]
    y = kernels("masked_gemv_concat", device).masked_gemv_parts(v, taus, weights)
    assert y.shape == (1, 1, 192)
    torch.testing.assert_close(y, torch.cat([v @ weight for weight in weights], -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"v": torch.randn(17, 8)}, "v"),
        ({"v": torch.ones(1, 8, dtype=torch.int64)}, "v"),
        ({"taus": [torch.zeros(8)]}, "weights"),
        ({"taus": [torch.zeros(8), torch.zeros(7)]}, r"taus\[1\]"),
        ({"weights": [torch.randn(8, 4)] * 4, "taus": [torch.zeros(8)] * 4}, "weights"),
        ({"weights": [torch.randn(8, 4), torch.randn(4, 8).t()]}, r"weights\[1\]"),
        ({"weights": [torch.randn(8, 4), torch.randn(8, 4).double()]}, r"weights\[1\]"),
        ({"biases": [torch.zeros(4), None]}, r"biases\[1\]"),
        ({"biases": [torch.zeros(4), torch.zeros(5)]}, r"biases\[1\]"),
    ],
)
def test_wrong_operands_are_refused(device, change, name):
    launch = kernels("masked_gemv_concat", device).masked_gemv_parts
    given = {"v": torch.randn(1, 8), "taus": [torch.zeros(8)] * 2, "weights": [torch.randn(8, 4)] * 2, "biases": []} | change
    with pytest.raises(BadOperand, match=name):
        launch(given["v"], given["taus"], given["weights"], given["biases"])
