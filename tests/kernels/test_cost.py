"""The cost model against measurements, and properties that decisions depend on; configs and their slices."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.errors import InvalidOption
from rana_fx.kernels.cost import (
    H100,
    H200,
    dense_us,
    masked_us,
    prefers_masked,
    prefers_rows,
    prefers_rows_on_cpu,
    rows_read,
    rows_us,
)
from rana_fx.kernels.triton.config import GROUP, Config, cdiv, configs, default_config, row_warps_of

# K, N, then medians in us on an H200 (bf16, one token): a dense matmul with the rank-major weight; the best masked launch of a
# sweep at 0, 50 and 70 % masked
MEASURED = [
    (4096, 12288, 28.6, 28.8, 18.3, 13.4),
    (4096, 22016, 46.7, 47.6, 28.7, 20.4),
    (11008, 4096, 26.0, 28.4, 17.9, 14.4),
    (4096, 4096, 12.6, 14.0, 9.8, 8.5),
    (2448, 12288, 18.4, 18.4, 12.5, 10.0),
    (2976, 22016, 35.7, 35.2, 21.3, 15.9),
]
SHAPES = {"K": st.integers(1, 65536), "N": st.integers(1, 65536), "T": st.integers(1, 16), "density": st.floats(0, 1)}


@pytest.mark.parametrize(("k", "n", "dense", "full", "half", "third"), MEASURED)
def test_within_fifteen_percent_of_measurements(k, n, dense, full, half, third):
    assert dense_us(k, n) == pytest.approx(dense, rel=0.15)
    for density, us in ((1.0, full), (0.5, half), (0.3, third)):
        assert masked_us(k, n, 1, density) == pytest.approx(us, rel=0.15)


@pytest.mark.parametrize(("k", "n"), [row[:2] for row in MEASURED])
def test_masks_pay_at_half_and_not_at_nothing(k, n):
    for device in (H100, H200):
        assert prefers_masked(k, n, 1, 0.5, device)
        assert masked_us(k, n, 1, 1.0, device) > dense_us(k, n, device)
        for tokens in (4, 8, 16):
            assert not prefers_masked(k, n, tokens, 0.5, device)


@pytest.mark.parametrize(("k", "n"), [(4096, 11008), (2048, 5632)])
def test_rows_that_are_skipped_pay_until_their_union_is_the_weight(k, n):
    for device in (H100, H200):
        assert prefers_rows(n, k, 1, 0.5, device) and prefers_rows(n, k, 2, 0.3, device)
        assert not prefers_rows(n, k, 1, 1.0, device)
        for tokens in (4, 5, 16):
            assert not prefers_rows(n, k, tokens, 0.5, device)
        assert not prefers_rows(n, k, 5, 0.01, device)
        # half of the rows, half of the bytes
        saved = dense_us(k, n, device) - rows_us(n, k, 1, 0.5, device)
        assert saved == pytest.approx(k * n / device.bytes_per_us, rel=0.01)


@given(T=SHAPES["T"], density=st.floats(0, 1), bits=st.sampled_from([16, 32]))
def test_rows_on_a_cpu_pay_for_fewer_tokens_and_less_density(T, density, bits):
    if prefers_rows_on_cpu(T, density, bits=bits):
        assert prefers_rows_on_cpu(max(T - 1, 1), density, bits=bits) and prefers_rows_on_cpu(T, density / 2, bits=bits)
        assert prefers_rows_on_cpu(T, density, bits=32)
    assert prefers_rows_on_cpu(1, density, bits=bits)
    assert not prefers_rows_on_cpu(8, 1.0, bits=bits)


@given(k=SHAPES["K"], t=SHAPES["T"], density=SHAPES["density"])
def test_union_of_masks(k, t, density):
    groups = cdiv(t, 4)
    assert density * k <= rows_read(k, t, density) + 1e-6 * k
    assert rows_read(k, t, density) <= min(groups * k, t * density * k) * (1 + 1e-9)
    assert math.isclose(rows_read(k, 1, density), k * density, abs_tol=1e-9 * k)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 50.0), (2, 75.0), (4, 93.75), (8, 187.5)])
def test_half_of_a_hundred_rows(tokens, rows):
    """Independent masks, read one by one, in one group of four, in two groups."""
    assert rows_read(100, tokens, 0.5) == pytest.approx(rows)


def test_fewer_bits_cost_less_where_bytes_decide():
    assert masked_us(4096, 12288, 1, 0.5, bits=16) < masked_us(4096, 12288, 1, 0.5, bits=32)
    for bits in (8, 4):
        assert masked_us(4096, 65536, 1, 1.0, bits=bits) < masked_us(4096, 65536, 1, 1.0, bits=16)


@given(**SHAPES, bits=st.sampled_from([4, 8, 16, 32]))
def test_default_config_is_one_wave_of_whole_slices(K, N, T, density, bits):
    config = default_config(K, N, T, density, 132, bits=bits)
    columns = cdiv(N, config.block_n)
    assert config.splits <= 64
    # 32 registers or more for each of an SM's threads
    assert config.splits == 1 or config.splits * columns * config.warps <= (26 if bits == 4 else 8) * 132
    assert config.splits == 1 or config.slice_ranks(K) >= 32
    # no slice is empty
    assert (config.splits - 1) * config.slice_ranks(K) < cdiv(K, 16) * 16
    assert config.early == 0 or T == 1


@pytest.mark.parametrize(
    ("warps", "block_n", "bits", "rows"), [(2, 512, 16, 1), (4, 256, 16, 4), (2, 1024, 4, 2), (4, 32, 8, 64)]
)
def test_warps_along_rows(warps, block_n, bits, rows):
    assert row_warps_of(warps, block_n, bits) == rows


@given(**SHAPES, bits=st.sampled_from([4, 8, 16]))
def test_at_most_sixteen_configs_and_the_default_first(K, N, T, density, bits):
    found = configs(K, N, T, density, bits=bits)
    assert 1 <= len(set(found)) == len(found) <= 16
    assert found[0] == default_config(K, N, T, density, bits=bits)


@given(ranks=st.integers(1, 3000), splits=st.integers(1, 40))
def test_slices_hold_every_rank_once(ranks, splits):
    size = Config(splits=splits).slice_ranks(ranks)
    held = [r // GROUP * GROUP * splits + s * GROUP + r % GROUP for s in range(splits) for r in range(size)]
    assert sorted(k for k in held if k < ranks) == list(range(ranks))


@pytest.mark.parametrize("choice", [{"block_n": 48}, {"block_m": 0}, {"splits": 0}, {"stages": 0}, {"warps": 3}, {"early": 3}])
def test_impossible_configs_are_refused(choice):
    with pytest.raises(InvalidOption):
        Config(**{"splits": 1, **choice})
