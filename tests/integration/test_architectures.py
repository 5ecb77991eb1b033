"""Every architecture, with few traces: linears, groups, blocks and stacks are found by dataflow, their counts are functions of
the depth, and a plan that keeps everything equals the dense model. Counts of one layer: tests/graph/test_coverage.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rana_fx
from rana_fx.calibration.batches import call
from rana_fx.evaluation.measure import measuring
from tests.support.adapted import EVERY, layouts, relative
from tests.support.architectures import counts_of, make, output
from tests.support.one_trace import one_trace


def full_rank(model, batches):
    """(layout, plan): a plan that keeps everything, rank adapters of full rank with threshold zero wherever the recipe puts
    adapters."""
    with layouts() as found:
        plan = rana_fx.adapt(model, batches, budget=0.9, recipe="static", progress=False)
    (layout,) = found
    adapters = []
    for adapter in plan.adapters:
        parts = [layout.sites[name].matrix() for name in adapter.sites]
        u, s, vh = torch.linalg.svd(torch.cat(parts).double(), full_matrices=False)
        ranks = len(s)
        adapters.append(
            replace(
                adapter,
                ranks=ranks,
                kept=float(ranks),
                tau=torch.zeros(ranks),
                router=(s[:, None] * vh).float().contiguous(),
                weight=u.t().float().contiguous(),
            )
        )
    whole = replace(plan, adapters=tuple(adapters))
    rana_fx.attach(model, whole)
    return layout, whole


@pytest.mark.parametrize("name", EVERY)
def test_counts_of_two_layers_and_full_rank_equals_dense(name):
    """Counts are linear in the depth, so they are determined by two layers, and by one (tests/graph/test_coverage.py)."""
    model, batch = make(EVERY[name], 2)
    batches = [batch, *(EVERY[name].inputs() for _ in range(4))]
    with one_trace(model) as graphs:
        layout, plan = full_rank(model, batches)
        traced = len(graphs)
        with measuring(model) as meter:
            got = output(meter.run(batch))
    assert len(graphs) == traced
    assert counts_of(layout) == EVERY[name].expected(2)
    covered = {site for adapter in plan.adapters for site in adapter.sites}
    # a rank of a layer with one output costs more than the layer
    assert covered == {site.name for site in plan.sites if site.counted and site.out_features > 1}
    with torch.no_grad():
        dense = output(call(model, batch))
    assert relative(got, dense) < 1e-5
    assert set(meter.result().density.values()) == {1.0}
