"""The observing backend, the instrumented model and the holdout batches that recipes get."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.holdout import Holdout, Tee
from rana_fx.calibration.probe import Probe, call_before, probing
from rana_fx.evaluation.measure import measuring
from rana_fx.recipes import RECIPES, Problem, needs_holdout


class Mlp(nn.Module):
    """An in-place relu between two linears, with a residual connection."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, attention_mask=None):  # noqa: ARG002
        return x + self.down(self.up(x).relu_())


@dataclass
class Batch:
    x: torch.Tensor
    attention_mask: torch.Tensor


class OfBatch(Mlp):
    def forward(self, batch):
        return super().forward(batch.x)


def sampled(model, batches):
    return calibrate(model, batches, wanted=lambda layout: {group.sites for group in layout.groups}, progress=False)


def test_a_probe_observes_nodes_and_leaves_the_output_alone():
    model, x = Mlp(), torch.randn(2, 3, 8)
    expected = model(x)
    seen, traced = [], []

    def instrument(graph_module, example_inputs):
        traced.append(len(example_inputs))
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function" and "linear" in str(node.target):
                call_before(node, lambda v, label: seen.append((label, probe.real(v).clone())), node.args[0], "read")

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with probing(model), torch.no_grad():
        probe = Probe(model, instrument)
        for _ in range(2):
            torch.testing.assert_close(probe.run({"x": x, "attention_mask": mask}), expected, rtol=0, atol=0)
        assert probe.tokens(probe.load({"x": x, "attention_mask": mask})) == 3
    assert len(traced) == 1 and [label for label, _ in seen] == ["read"] * 4
    assert torch.equal(seen[0][1], x[mask.bool()])
    assert seen[1][1].shape == (3, 16)


@pytest.mark.parametrize("limits", [{}, {"recompile_limit": 70, "accumulated_recompile_limit": 210}])
def test_every_form_of_batch_of_a_small_model_is_traced(limits):
    """A text that is an argument is compiled anew for every value; a model of few modules may have as many as others."""

    class Scaled(Mlp):
        def forward(self, x, rate):
            return super().forward(x) if rate == "none" else super().forward(x * len(rate))

    model, traced = Scaled(), []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False, **limits), probing(model), torch.no_grad():
        probe = Probe(model, lambda *_: traced.append(1))
        for length in range(max(40, limits.get("recompile_limit", 0))):
            probe.run({"x": torch.randn(2, 8), "rate": "r" * length})
    assert len(traced) == max(40, limits.get("recompile_limit", 0))


def test_what_a_block_computes_in_place_leaves_the_callers_rows_alone():
    """The pointwise part of a block writes into its input: relu_."""
    model = Mlp()
    (block,) = sampled(model, [torch.randn(4, 8)]).layout.blocks
    rows = torch.randn(5, 16)
    before = rows.clone()
    assert torch.equal(block.pointwise(rows), before.relu())
    assert torch.equal(rows, before)


def test_a_site_leads_to_its_group_and_its_sample():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.c(torch.tanh(self.a(x) + self.b(x)) + x)

    found = sampled(Two(), [torch.randn(4, 8)])
    assert found.layout.sites_of_group("a") == found.layout.sites_of_group("b") == ("a", "b")
    assert found.layout.group_of("c").sites == ("c",)
    assert found.samples[found.layout.sites_of_group("b")].rows().shape == (4, 8)


def test_padding_of_a_batch_that_is_an_object_is_not_measured():
    model = OfBatch()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 2:] = 0
    batch = Batch(torch.randn(2, 6, 8), mask)
    rana_fx.adapt(model, [batch] * 4, budget=0.5, recipe="teal", progress=False)
    with measuring(model) as meter:
        meter.run(batch)
        assert meter.result().tokens == 8


def test_every_eighth_batch_is_held_out():
    tee = Tee(torch.full((1,), index) for index in range(20))
    assert [int(batch) for batch in tee] == [index for index in range(20) if index not in (7, 15)]
    holdout = tee.holdout(nn.Linear(1, 1))
    assert [int(batch) for batch in holdout.held] == [7, 15] and [int(batch) for batch in holdout.batches] == [0, 1, 2, 3]
    few = Tee([torch.zeros(1), torch.ones(1)])
    assert len(list(few)) == 2 and [int(batch) for batch in few.holdout(nn.Linear(1, 1)).held] == [1]


class OldRecipe:
    """A third-party recipe for the previous release, with its old names."""

    name = "old"
    rehearses = True

    def wants(self, layout):
        return {layout.groups[site.group].sites for site in layout.sites.values() if site.counted}

    def solve(self, problem):
        with problem.rehearsal.opened(problem.layout) as stage:
            assert stage.run(problem.rehearsal.held[0]).shape == (4, 8)
        return []


def test_a_recipe_by_the_old_names_still_works_with_a_warning(monkeypatch):
    monkeypatch.setitem(RECIPES, "old", OldRecipe())
    with pytest.warns(DeprecationWarning) as caught:
        plan = rana_fx.adapt(Mlp(), [torch.randn(4, 8)], recipe="old", progress=False)
    assert plan.adapters == ()
    texts = {str(warning.message) for warning in caught}
    assert any("recipe old: rehearses is named needs_holdout now" in text for text in texts)
    assert any("Problem.rehearsal is named holdout now" in text for text in texts)
    assert any("Holdout.opened is named instrumented now" in text for text in texts)
    assert needs_holdout(RECIPES["rana"]) and not needs_holdout(RECIPES["teal"])


def test_problems_have_no_holdout_unless_asked_for():
    model = Mlp()
    found = sampled(model, [torch.randn(4, 8)])
    assert Problem(found.layout, found.samples, 0.5, "flops", "teal", False).holdout is None
    with Holdout(model, (), ()).instrumented(found.layout) as instrumented:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        x = torch.randn(2, 8)
        doubled = instrumented.run(x, lambda site, _, y: 2 * y if site == "down" else y)
        torch.testing.assert_close(doubled - x, 2 * (instrumented.run(x) - x))
    assert all(parameter.requires_grad for parameter in model.parameters())
