"""Reservoir, histogram thresholds, basis and line search against direct computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.calibration.samples import Reservoir
from rana_fx.calibration.score_histogram import Histogram
from rana_fx.recipes.basis import output_basis, second_moment
from rana_fx.recipes.paper.line_search import candidate_ranks, energies, line_search
from rana_fx.recipes.paper.recipe import splits


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_reservoir_keeps_distinct_rows(sizes, capacity):
    reservoir = Reservoir(capacity, seed=1)
    start = 0
    for size in sizes:
        reservoir.add(torch.arange(start, start + size, dtype=torch.float32)[:, None])
        start += size
    rows = reservoir.rows().flatten().tolist()
    assert len(rows) == min(capacity, start)
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(map(float, range(start)))


def test_reservoir_is_uniform():
    hits = torch.zeros(50)
    for seed in range(400):
        reservoir = Reservoir(10, seed=seed)
        for chunk in torch.arange(50.0)[:, None].split(7):
            reservoir.add(chunk)
        hits[reservoir.rows().flatten().long()] += 1
    # each of 50 rows is kept with probability 1/5: 80 of 400 times, standard deviation 8
    assert ((hits - 80).abs() < 5 * 8).all()


def test_equal_seeds_keep_equal_tokens():
    a, b = Reservoir(5, seed=3), Reservoir(5, seed=3)
    for chunk in torch.arange(40.0)[:, None].split(9):
        a.add(chunk)
        b.add(chunk.repeat(1, 2))
    assert torch.equal(a.rows()[:, 0], b.rows()[:, 1])


@given(st.integers(0, 2**16), st.integers(1, 200), st.floats(1e-6, 1e6))
def test_histogram_threshold_and_energy(seed, keep, scale):
    scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)).square() * scale
    histogram = Histogram(torch.zeros(6, dtype=torch.long), float(scores.max()))
    histogram.add(scores)
    threshold, energy = histogram.merged().keep(keep)
    ordered = scores.flatten().sort(descending=True).values
    assert threshold == pytest.approx(float(ordered[keep - 1]), rel=2e-3)
    assert energy == pytest.approx(float(ordered[:keep].double().sum()), rel=1e-3)


def test_histogram_extremes():
    histogram = Histogram(torch.zeros(3, dtype=torch.long), 1.0)
    histogram.add(torch.tensor([[0.0, 0.5, 1.0]]))
    profile = histogram.merged()
    assert profile.keep(0) == (float("inf"), 0.0)
    assert profile.keep(3)[0] == 0.0


@pytest.mark.parametrize(("out", "width"), [(24, 10), (10, 24), (16, 16), (7, 1)])
@pytest.mark.parametrize("tokens", [5, 200])
def test_basis_reproduces_the_weight_at_full_rank(out, width, tokens):
    """Also when the sample spans less than the input space."""
    weight = torch.randn(out, width)
    basis = output_basis(weight, second_moment(torch.randn(tokens, width)))
    torch.testing.assert_close(basis.a_OD @ basis.b_DI, weight, rtol=0, atol=1e-5)
    identity = basis.a_OD.double().t() @ basis.a_OD.double()
    torch.testing.assert_close(identity, torch.eye(min(out, width), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.35, 0.5, 0.7])
def test_line_search_matches_sorting(fraction):
    rows, weight = torch.randn(300, 48) * torch.logspace(0, -2, 48), torch.randn(96, 48)
    basis = output_basis(weight, second_moment(rows))
    (choice,) = line_search(energies(basis.b_DI, rows), 96, 48, [fraction])
    z2 = (rows.double() @ basis.b_DI.double().t()).square()
    best = (-1.0, 0, 0.0)
    for rank in candidate_ranks(48):
        kept = (fraction * 96 * 48 - 48 * rank) / 96
        if 0 < kept < rank:
            ordered = z2[:, :rank].flatten().sort(descending=True).values
            count = int(300 * kept)
            best = max(best, (float(ordered[:count].sum() / z2.sum()), rank, float(ordered[count - 1])), key=lambda b: b[0])
    assert choice.rank == best[1]
    assert choice.coverage == pytest.approx(best[0], rel=1e-3)
    assert choice.threshold == pytest.approx(best[2], rel=1e-2)


def test_no_feasible_rank_is_none():
    rows, weight = torch.randn(50, 4), torch.randn(4, 4)
    basis = output_basis(weight, second_moment(rows))
    assert line_search(energies(basis.b_DI, rows), 4, 4, [0.01]) == [None]


def test_splits_are_the_papers_grid():
    three = splits([1.0, 1.0, 1.0])
    assert len(three) == 37
    shares = {tuple(round(share * 6) for share in split) for split in three}
    assert all(sum(split) == 18 and all(3 <= a <= 9 for a in split) for split in shares)
    assert len(splits([1.0, 1.0])) == 7
    for split in splits([2.0, 1.0]):
        assert 2 * split[0] + split[1] == pytest.approx(3.0)
