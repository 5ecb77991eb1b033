"""The cost model against what was measured, and the properties that decisions rely on; configs and their slices."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.errors import InvalidOption
from rana_fx.kernels.config import Config, cdiv, configs, default_config
from rana_fx.kernels.cost import H100, H200, dense_us, masked_us, prefers_masked, rows_read

# K, N, then medians in us on an H200: dense, one launch at 50 % masked, at 70 %
MEASURED = [(4096, 12288, 31.4, 20.0, 14.6), (4096, 22016, 47.2, 28.5, 20.8), (11008, 4096, 27.5, 19.3, 14.4)]
SHAPES = {"K": st.integers(1, 65536), "N": st.integers(1, 65536), "T": st.integers(1, 16), "density": st.floats(0, 1)}


@pytest.mark.parametrize(("k", "n", "dense", "half", "third"), MEASURED)
def test_within_ten_percent_of_measurements(k, n, dense, half, third):
    assert dense_us(k, n) == pytest.approx(dense, rel=0.1)
    assert masked_us(k, n, 1, 0.5) == pytest.approx(half, rel=0.1)
    assert masked_us(k, n, 1, 0.3) == pytest.approx(third, rel=0.1)


@pytest.mark.parametrize(("k", "n"), [row[:2] for row in MEASURED])
def test_masks_pay_at_half_and_not_at_nothing(k, n):
    for device in (H100, H200):
        assert prefers_masked(k, n, 1, 0.5, device)
        assert not prefers_masked(k, n, 1, 1.0, device)
        assert not prefers_masked(k, n, 8, 0.5, device)


@given(k=SHAPES["K"], t=SHAPES["T"], density=SHAPES["density"])
def test_union_of_masks(k, t, density):
    assert density * k <= rows_read(k, t, density) + 1e-6 * k
    assert rows_read(k, t, density) <= min(k, t * density * k) * (1 + 1e-9)
    assert math.isclose(rows_read(k, 1, density), k * density, abs_tol=1e-9 * k)


def test_fewer_bits_cost_less():
    times = [masked_us(4096, 12288, 1, 0.5, bits=bits) for bits in (4, 8, 16, 32)]
    assert times == sorted(times)


@given(**SHAPES)
def test_default_config_fills_the_gpu_two_to_four_times(K, N, T, density):
    config = default_config(K, N, T, density, 132)
    programs = config.splits * cdiv(N, config.block_n)
    size = config.slice_ranks(K)
    assert size <= 1024
    assert config.splits == 1 or size <= 64 or programs >= 2 * 132 or cdiv(K, 64) * cdiv(N, config.block_n) < 2 * 132
    if size < 512 and size > 64:
        assert programs <= 5 * 132


@given(**SHAPES)
def test_at_most_sixteen_configs_share_their_splits(K, N, T, density):
    found = configs(K, N, T, density)
    assert 1 <= len(set(found)) == len(found) <= 16
    assert {config.splits for config in found} == {default_config(K, N, T, density).splits}


@given(ranks=st.integers(1, 3000), splits=st.integers(1, 40), group=st.sampled_from([1, 4, 16, 64]))
def test_slices_hold_every_rank_once(ranks, splits, group):
    size = Config(splits=splits, group=group).slice_ranks(ranks)
    held = [r // group * group * splits + s * group + r % group for s in range(splits) for r in range(size)]
    assert sorted(k for k in held if k < ranks) == list(range(ranks))


@pytest.mark.parametrize("choice", [{"block_n": 48}, {"block_m": 0}, {"splits": 0}, {"stages": 0}, {"warps": 3}])
def test_impossible_configs_are_refused(choice):
    with pytest.raises(InvalidOption):
        Config(**{"splits": 1, **choice})
