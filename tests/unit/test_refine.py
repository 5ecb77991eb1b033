"""A refinement lowers the divergence on text that it did not see, at the same cost, or leaves the plan as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.adaptation import calibrated, solved
from rana_fx.calibration.holdout import Holdout
from rana_fx.errors import InvalidOption, RanaWarning, TooLittleToRefine
from rana_fx.recipes import RECIPES, Rana
from rana_fx.recipes.simulate import AdapterSimulator
from rana_fx.refinement.distill import COST_RISES, Judge, _Schedule
from rana_fx.refinement.parameters import Trained
from rana_fx.refinement.text import RefinementText
from rana_fx.runtime.attachment import attached
from tests.support.architectures import VOCAB, build

SHORT = rana_fx.refinement.Refine(tokens=1200, rate=0.003)


def text(count, seed=0, rows=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (rows, 12), generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("plain_llama", 1)[0]


def adapt(model, batches, **options):
    plan = rana_fx.adapt(model, batches, progress=False, **{"budget": 0.6, "recipe": "teal"} | options)
    if attached(model) is not None:
        rana_fx.detach(model)
    return plan


def without_note(plan):
    """(the plan without the last note on it, that note)."""
    return replace(plan, skips=plan.skips[:-1]), plan.skips[-1].text


class Residual(nn.Module):
    """Not of transformers: two arguments, one of them nested, and no logits."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x, options):
        return x + self.down(torch.relu(self.up(x))) * options["scales"][0]


def inputs():
    """Half of them are always the same small number: a mask drops them, and the bias that they amount to is missing."""
    return torch.cat([torch.full((4, 8, 8), 0.4), torch.randn(4, 8, 8).sign()], -1), {"scales": [torch.ones(())]}


@pytest.fixture(scope="module")
def residual():
    """(model, batches, its refined plan)."""
    torch.manual_seed(0)
    model, batches = Residual(), [inputs() for _ in range(40)]
    return model, batches, adapt(model, batches, budget=0.5, refine=SHORT)


def test_text_that_nothing_saw_loses_less_at_the_same_cost(model):
    options = {"budget": None, "budgets": [0.4, 0.6], "held_out": text(4, seed=1)}
    before = adapt(model, text(12, rows=24), **options)
    after = adapt(model, text(12, rows=24), refine=rana_fx.refinement.Refine(tokens=6000, rate=0.003), **options)
    for old, new in zip(before, after, strict=True):
        assert new.curve.at(new.budget).kl.mean < 0.97 * old.curve.at(old.budget).kl.mean
        assert new.notes()[-1].startswith("refined on 5,976 tokens")
        assert new.expected_budget() <= old.expected_budget() * (1 + COST_RISES)
        for adapter in new.adapters:  # masks of inputs have a weight and a bias of their own now
            assert adapter.kind == "neuron" and adapter.weight is not None and adapter.bias is not None


def test_a_missing_bias_is_found_in_any_model_and_batch(residual):
    note = residual[2].notes()[-1]
    assert note.startswith("refined on 1,216 tokens: divergence from the dense model")
    after, before = (float(word.strip(",")) for word in note.split() if word.startswith("0."))
    assert after < 0.6 * before


def test_seeds(residual):
    model, batches, plan = residual
    assert adapt(model, batches, budget=0.5, refine=SHORT).digest() == plan.digest()
    other = adapt(model, batches, budget=0.5, refine=SHORT, seed=1)
    assert not torch.equal(other.adapters[0].bias, plan.adapters[0].bias)


@pytest.mark.parametrize(("rate", "reason"), [(3.0, "was the lowest"), (1e38, "not finite")])
def test_divergence_keeps_the_plan(model, rate, reason):
    plain = adapt(model, text(9))
    with pytest.warns(RanaWarning, match=f"the plan is not refined, but as it is without: .*{reason}"):
        plan = adapt(model, text(9), refine=replace(SHORT, rate=rate))
    kept, note = without_note(plan)
    assert kept.digest() == plain.digest()
    assert (
        note.startswith("not refined: on 108 tokens held out of the training the divergence did not surely fall")
        and reason in note
    )


def test_compiled_as_simulated_also_when_saved(residual, tmp_path, graphs_as_rewritten):
    model, batches, plan = residual
    plan.save(tmp_path)
    assert rana_fx.load_plan(tmp_path).digest() == plan.digest()
    layout, batch = calibrated(model, batches[:1], RECIPES["dense"]).layout, inputs()
    with Holdout(model, (), ()).instrumented(layout) as running, torch.no_grad():
        simulated = running.run(batch, AdapterSimulator(running, layout, plan.adapters).step)
    rana_fx.attach(model, tmp_path)
    with torch.no_grad():
        compiled, dense = torch.compile(model, backend=rana_fx.backend)(*batch), model(*batch)
    rana_fx.detach(model)
    assert len(graphs_as_rewritten) == 1
    # sums of at most 64 products in another order
    assert (compiled - simulated).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * simulated.abs().max()
    assert (compiled - dense).abs().max() > 0.01 * dense.abs().max()


@pytest.mark.parametrize(("recipe", "metric", "budget"), [(Rana(), "flops", 0.6), (Rana(), "bytes", 0.3)])
def test_parameters_start_at_the_plan_and_integers_stay(model, recipe, metric, budget):
    calibration = calibrated(model, text(9), recipe)
    adapters = solved(calibration.problem(budget=budget, metric=metric, recipe=recipe.name), recipe)
    trained = Trained(calibration.layout, adapters)
    for old, new in zip(adapters, trained.stored(), strict=True):
        assert all(torch.equal(value, new.tensors()[key]) for key, value in old.tensors().items())
        assert new.with_kept(new.expected).expected_cost.over(old.expected_cost)[metric] == pytest.approx(1)
    with Holdout(model, (), ()).instrumented(calibration.layout) as running:
        judge = Judge(running, calibration.layout, text(2, seed=3), metric)
        before, zero = judge.of(adapters), judge.of(trained.stored())
        assert zero.cost == pytest.approx(before.cost) and zero.divergence == pytest.approx(before.divergence)
        assert judge.of(trained.adapters()).divergence == pytest.approx(before.divergence, rel=1e-3)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        moved = judge.at_cost(trained.stored(), before.cost)
        assert moved.cost <= before.cost * (1 + COST_RISES) < judge.of(trained.stored()).cost * 1.5
    for old, new in zip(adapters, moved.adapters, strict=True):
        for key, matrix in old.matrices.items():
            assert new.bits()[key] == matrix.bits
            same = torch.equal(matrix.values, new.matrices[key].values)
            assert same == (matrix.scale is not None)
            assert matrix.scale is None or not torch.equal(matrix.scale, new.matrices[key].scale)


def test_minutes_and_rates():
    pieces = text(3)
    for minutes, steps in ((None, 21), (60.0, 21), (1e-9, 2)):
        schedule = _Schedule(rana_fx.refinement.Refine(tokens=1000, minutes=minutes, rate=0.5), pieces, seed=0)
        assert schedule.steps == 21
        # each piece comes once before one comes again
        assert all({id(schedule.piece(3 * step + part)) for part in range(3)} == set(map(id, pieces)) for step in range(7))
        rates = [schedule.rate(step) for step in range(21)]
        assert max(rates) == 0.5 and rates.index(0.5) in (2, 3) and rates[0] == pytest.approx(0.5 / 3) and 0 < rates[-1] < 0.01
        schedule.shorten(2)
        assert schedule.steps == steps


def test_text_is_divided_and_passed_on():
    batches = text(9)
    given = RefinementText(iter(batches), tokens=10**6)
    assert [id(batch) for batch in given] == list(map(id, batches))
    training, held = given.parts()
    # of 36 rows nine judge, and one between is left out
    assert torch.equal(torch.cat(training), torch.cat(batches)[:26]) and torch.equal(torch.cat(held), torch.cat(batches)[27:])
    short = RefinementText(batches, tokens=12)
    assert len(list(short)) == len(short) == 9 and [len(part) for part in short.parts()] == [23, 8]  # as many as are needed
    whole = RefinementText([{"x": torch.cat(batches)}, {"x": torch.zeros(1, 12), "attention_mask": torch.zeros(1, 12)}], tokens=9)
    whole.read()
    training, held = whole.parts()
    # the only batch, in four; a row without tokens does not count
    assert [len(piece["x"]) for piece in training] == [9, 9, 9] and [len(row["x"]) for row in held] == [1] * 9


def test_bad_input_is_told_before_calibration(model, monkeypatch):
    monkeypatch.setattr("rana_fx.adaptation.calibrate", lambda *_, **__: pytest.fail("calibrated"))
    for facts, expected in (
        ({"tokens": 0}, "option refine.tokens=0 is not valid: expected a positive number of tokens"),
        ({"tokens": 0.5}, "refine.tokens=0.5"),
        ({"minutes": -1}, "option refine.minutes=-1 is not valid: expected None or a positive number"),
        ({"rate": math.inf}, "refine.rate=inf"),
    ):
        with pytest.raises(InvalidOption, match=expected):
            rana_fx.refinement.Refine(**facts)
    with pytest.raises(InvalidOption, match=r"option refine=1000 is not valid: expected None or rana_fx.refinement.Refine"):
        adapt(model, text(2), refine=1000)
    for recipe in ("exact", "dense"):
        with pytest.raises(InvalidOption, match=f"recipe '{recipe}' approximates nothing, so there is nothing to train"):
            adapt(model, text(2), refine=SHORT, recipe=recipe)
    for options in ({"refine": SHORT}, {"refine": replace(SHORT, text=text(7))}):
        with pytest.raises(TooLittleToRefine, match="got 28 rows, expected at least 32"):
            adapt(model, text(7), **options)
    with pytest.raises(InvalidOption, match=r"option refine.text='Tensor' is not valid"):
        adapt(model, text(9), refine=replace(SHORT, text=text(1)[0]))
