"""Recipe rana without gradients, memory, rows or a feasible budget; notes of the plan report this."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.calibration.batches import halves
from rana_fx.calibration.holdout import Tee
from rana_fx.calibration.sensitivity import sensitivities
from rana_fx.errors import BudgetUnreachable
from rana_fx.recipes.rana import refine
from rana_fx.recipes.rana.units import units_of
from tests.recipes.test_rana import Classifier, calibrated_with_holdout


def batches(count=9, rows=4, tokens=128):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, tokens, 4, generator=generator),) for _ in range(count)]


class Integer(Classifier):
    """A model with an output that is not differentiable."""

    def forward(self, x):
        return super().forward(x)["logits"].argmax(-1)


@torch.library.custom_op("rana_test::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    """An operation without a derivative."""
    return x.clone()


opaque.register_fake(lambda x: torch.empty_like(x))


class OneWay(Classifier):
    """A model with a backward pass that fails."""

    def forward(self, x):
        return {"logits": opaque(super().forward(x)["logits"])}


class Infinite(Classifier):
    """A model with gradients that are not finite."""

    def forward(self, x):
        logits = super().forward(x)["logits"]
        return {"logits": logits + (logits * 0).sqrt()}


class Cut(Classifier):
    """A model without gradients in its first block."""

    def forward(self, x):
        h = self.stem(x)
        h = h + self.downs[0](torch.nn.functional.gelu(self.ups[0](h)))
        h = h.detach() * 1
        h = h + self.downs[1](torch.nn.functional.gelu(self.ups[1](h)))
        return {"logits": self.head(h)}


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Integer, "errors of all layers count alike: its output does not depend on its linears by differentiable operations"),
        (
            OneWay,
            "errors of all layers count alike: the backward pass failed: Trying to backward through rana_test.opaque.default",
        ),
        (Infinite, "errors of all layers count alike: gradients were not finite at ups.0 (4 of 4 groups of linears are without)"),
        (Cut, "there errors count as on average: no gradient reached ups.0 (2 of 4 groups of linears are without)"),
    ],
)
def test_a_backward_pass_that_fails_is_said_in_plan_and_report(cls, said, tmp_path):
    torch.manual_seed(0)
    model = cls()
    plan = rana_fx.adapt(model, batches(), budget=0.5, progress=False)
    assert plan.adapters and plan.expected_budget() == pytest.approx(0.5, abs=0.02)
    (note,) = plan.remarks()
    assert said in note
    report = rana_fx.explain(model, batches()[0])
    assert report.notes == (note,) and note in " ".join(str(report).split()) and note in plan.summary()
    assert {skip.site for skip in plan.left} == {"stem", "head"}
    plan.save(tmp_path / "plan")
    assert rana_fx.load_plan(tmp_path / "plan").remarks() == plan.remarks()


def test_a_backward_pass_that_works_needs_no_note():
    torch.manual_seed(0)
    model = Classifier()
    assert rana_fx.adapt(model, batches(), budget=0.5, progress=False).remarks() == ()
    assert rana_fx.explain(model, batches()[0]).notes == ()


def short_of_memory(stage, most):
    """The stage, with an out-of-memory error for batches above that many texts."""
    sizes, run = [], stage.run

    def limited(batch, step=None):
        sizes.append(len(batch[0]))
        if len(batch[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch, step)

    stage.run = limited
    return sizes


def test_a_backward_pass_short_of_memory_takes_smaller_batches():
    torch.manual_seed(0)
    layout, _, holdout = calibrated_with_holdout(Classifier(), batches(tokens=512))
    with holdout.instrumented(layout) as stage:
        whole = sensitivities(stage, layout, units_of(layout), holdout.batches)
        sizes = short_of_memory(stage, 2)
        found = sensitivities(stage, layout, units_of(layout), holdout.batches)
        assert sizes == [4, 2, 2] * 4
        short_of_memory(stage, 0)
        none = sensitivities(stage, layout, units_of(layout), holdout.batches)
    assert found.missing == "" and found.moments.keys() == whole.moments.keys()
    for unit, moment in whole.moments.items():
        # labels are drawn anew, 8192 of them
        assert float((found.moments[unit] - moment).norm() / moment.norm()) < 0.1
    assert (
        none.moments == {} and none.missing == "the backward pass failed: out of memory, on a batch that cannot be made smaller"
    )


def test_halves_are_of_all_tensors_alike():
    batch = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.ones(3, 4), "use_cache": False}
    first, second = halves(batch)
    assert first["input_ids"].tolist() == [[0, 1, 2, 3]] and second["attention_mask"].shape == (2, 4)
    assert second["use_cache"] is False
    assert halves((torch.zeros(1, 4),)) == [] and halves((torch.zeros(4, 4), torch.zeros(3, 4))) == []


def test_large_batches_of_texts_are_run_in_pieces():
    tee = Tee([{"input_ids": torch.full((8, 512), index)} for index in range(9)])
    assert len(list(tee)) == 8
    holdout = tee.holdout(nn.Linear(1, 1))
    assert [tuple(piece["input_ids"].shape) for piece in holdout.batches] == [(4, 512)] * 8
    assert [int(piece["input_ids"][0, 0]) for piece in holdout.held] == [7, 7]
    # a single batch gives as many pieces as four
    tee = Tee([{"input_ids": torch.zeros(64, 512, dtype=torch.long)}])
    list(tee)
    assert len(tee.holdout(nn.Linear(1, 1)).batches) == 8


@pytest.mark.parametrize("budget", [0.3, 0.1, 0.02])
def test_low_budgets_are_kept(budget):
    torch.manual_seed(0)
    plan = rana_fx.adapt(Classifier(), batches(), budget=budget, progress=False)
    assert plan.expected_budget() == pytest.approx(budget, rel=0.1)


def test_a_budget_that_the_adapted_model_does_not_keep_is_unreachable(monkeypatch):
    """Masks that keep more in the adapted model than the target, at any multiplier."""
    monkeypatch.setattr(refine._Refinement, "_measured_cost", lambda self, *_: 0.4 * self._split.total)
    torch.manual_seed(0)
    with pytest.raises(BudgetUnreachable, match=r"budget=0\.200 .* lowest reachable budget is 0\.410 .*adapted model"):
        rana_fx.adapt(Classifier(), batches(), budget=0.2, progress=False)


class Biased(Classifier):
    """A model with a linear whose input is the same for every token."""

    def forward(self, x):
        h = self.stem(x)
        h = h + self.downs[0](torch.nn.functional.gelu(self.ups[0](h)))
        h = h + self.downs[1](torch.ones_like(self.ups[1](h)) + 0 * self.ups[1](h))
        return {"logits": self.head(h)}


def test_a_linear_whose_input_never_changes_stays_dense_and_that_is_said():
    torch.manual_seed(0)
    model = Biased()
    rana_fx.adapt(model, batches(), budget=0.7, progress=False)
    row = next(row for row in rana_fx.explain(model, batches()[0]).rows if row.site == "downs.1")
    assert row.action == "dense"
    assert row.detail.startswith("its input is the same for all")


@pytest.mark.parametrize("batch", [torch.ones(1, 64, 4), torch.randn(1, 1, 4)], ids=["constant", "single token"])
def test_where_nothing_changes_no_plan_is_made_up(batch):
    with pytest.raises(BudgetUnreachable, match=r"100\.0% of the cost .* ups\.0: its input is the same for all \d+ calibration"):
        rana_fx.adapt(Classifier(), [(batch,)] * 9, budget=0.6, progress=False)


class Narrow(Classifier):
    """A model whose blocks read inputs that span four directions of 64."""

    def __init__(self):
        super().__init__(width=64)

    def forward(self, x):
        h = self.stem(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            h = h + 0 * down(torch.nn.functional.gelu(up(self.stem(x))))
        return {"logits": self.head(h)}


def test_an_input_of_few_directions_gets_a_small_rank_and_that_is_said():
    torch.manual_seed(0)
    model = Narrow()
    model.stem.bias.data.zero_()
    plan = rana_fx.adapt(model, batches(), budget=0.6, progress=False)
    remarks = plan.remarks("ups.0")
    assert remarks == ("its input spans 4 of 64 directions in the calibration text",)
    adapter = plan.adapter_of("ups.0")
    assert adapter is not None and adapter.ranks <= 8
    row = next(row for row in rana_fx.explain(model, batches()[0]).rows if row.site == "ups.0")
    assert row.detail.endswith(remarks[0])


def test_too_few_rows_for_a_basis_are_said():
    torch.manual_seed(0)
    model = Classifier()
    plan = rana_fx.adapt(model, [(torch.randn(1, 12, 4),)], budget=0.6, progress=False)
    assert plan.remarks("ups.0") == ("9 calibration tokens are too few for its 16 ranks",)
    assert all(adapter.kind == "neuron" for adapter in plan.adapters)
