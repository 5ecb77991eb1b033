"""Batches that run different parts of a model: the layout is the union, whichever comes first; what none ran is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.forward_passes import spliced
from rana_fx.calibration.holdout import Tee
from rana_fx.calibration.samples import Keep

WIDTH = 16


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.gate(x)) * self.up(x))


class Seeing(nn.Module):
    """A tower over pixels, and text, which joins what the tower makes."""

    def __init__(self):
        super().__init__()
        self.text = nn.ModuleList(Mlp() for _ in range(2))
        self.vision, self.project = nn.ModuleList(Mlp() for _ in range(2)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, pixels=None):
        if pixels is not None:
            for block in self.vision:
                pixels = block(pixels)
            x = torch.cat([self.project(pixels), x], 1)
        for block in self.text:
            x = block(x)
        return x


def seeing():
    torch.manual_seed(0)
    return Seeing().eval()


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_text(count=4):
    return [{"x": drawn(4, 16, WIDTH, seed=seed)} for seed in range(count)]


def of_images(count=4):
    return [{"x": drawn(4, 16, WIDTH, seed=50 + s), "pixels": drawn(4, 9, WIDTH, seed=s)} for s in range(count)]


def every_group(layout):
    return {group.sites for group in layout.groups}


def sampled(model, batches, wanted=every_group):
    return calibrate(model, batches, wanted=wanted, progress=False)


def facts(layout):
    sites = [(s.name, s.role, s.uses, s.group, s.attention) for s in layout.sites.values()]
    blocks = [(block.ups, block.down, block.gate) for block in layout.blocks]
    return sites, [(group.sites, group.seen_with) for group in layout.groups], blocks, layout.skips, layout.unread


def test_the_first_batch_does_not_decide_which_linears_there_are():
    """Layouts are equal; every row that a group read is in its sample, once."""
    model = seeing()
    found = sampled(model, of_text() + of_images())
    other = sampled(model, of_images() + of_text())
    assert facts(found.layout) == facts(other.layout)
    assert {block.down for block in found.layout.blocks} == {f"{at}.{i}.down" for at in ("vision", "text") for i in (0, 1)}
    assert next(iter(found.layout.sites)) == "vision.0.gate" and list(found.layout.sites)[-1] == "text.1.down"
    for name, rows in (("vision.1.up", 4 * 36), ("text.0.up", 8 * 64 + 4 * 36)):
        key = found.layout.sites_of_group(name)
        assert found.samples[key].seen == other.samples[key].seen == rows
        mine, theirs = (one.samples[key].rows().double() for one in (found, other))
        torch.testing.assert_close(mine.t() @ mine, theirs.t() @ theirs, rtol=1e-12, atol=0)  # sums of at most 656 rows in fp64


@pytest.mark.parametrize("recipe", ["paper", "rana"])
def test_plans_of_both_orders_adapt_the_same_linears(recipe):
    plans = []
    for batches in (of_text(8) + of_images(8), of_images(8) + of_text(8)):
        plans.append(rana_fx.adapt(seeing(), batches, budget=0.6, recipe=recipe, progress=False))
    first, second = ({site: made.kind for made in plan.adapters for site in made.sites} for plan in plans)
    assert first == second and any("vision" in site for site in first)
    assert plans[0].sites == plans[1].sites and [made.name for made in plans[0].adapters] == [a.name for a in plans[1].adapters]


def test_what_no_batch_ran_is_named():
    model = seeing()
    plan = rana_fx.adapt(model, of_text(), budget=0.6, recipe="paper", progress=False)
    assert plan.notes() == ("6 linears of vision, the linear project ran in no batch: they stay dense, outside of the budget",)
    assert ("vision", "6 linears of vision ran in no batch") in {(skip.site, skip.reason) for skip in plan.left}
    rows = {row.site: row for row in rana_fx.explain(model, of_images(1)[0]).rows}
    assert rows["vision.1.up"].action == "dense" and rows["vision.1.up"].detail == "6 linears of vision ran in no batch"
    assert rows["project"].detail == "ran in no batch"
    rows = {row.site: row for row in rana_fx.explain(model, of_text(1)[0]).rows}
    assert rows["vision"].detail == "6 linears of vision did not run in this batch" and rows["vision"].action == "skipped"


class Switched(nn.Module):
    """Linears in a function and in a module that torch.compile leaves alone."""

    def __init__(self):
        super().__init__()
        self.mlp, self.off, self.inner = Mlp(), Mlp(), nn.Linear(WIDTH, WIDTH)
        self.off.forward = torch.compiler.disable(self.off.forward)

    @torch.compiler.disable
    def aside(self, x):
        return torch.nn.functional.linear(x, self.inner.weight)

    def forward(self, x):
        return self.mlp(self.off(x) + self.aside(x))


def test_linears_where_compilation_is_disabled_are_named():
    model = Switched().eval()
    plan = rana_fx.adapt(model, of_text(), budget=0.6, recipe="paper", progress=False)
    assert {skip.site: skip.reason for skip in plan.left} == {
        "off": "3 linears of off ran outside of any traced graph",
        "inner": "ran outside of any traced graph",
    }
    rows = {row.site: row.detail for row in rana_fx.explain(model, of_text(1)[0]).rows}
    assert rows["off"] == "3 linears of off ran outside of any traced graph"
    rana_fx.detach(model)
    model.mlp.forward = torch.compiler.disable(model.mlp.forward)
    with pytest.raises(rana_fx.errors.NoLinears, match="3 linears of mlp: ran outside of any traced graph"):
        rana_fx.adapt(model, of_text(), progress=False)


class Routed(nn.Module):
    """Experts in a loop; an expert that no token chose does not run."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x, chosen):
        for number, expert in enumerate(self.experts):
            if number in chosen:
                x = x + expert(x)
        return x


@pytest.mark.parametrize("recipe", ["paper", "rana", "cats"])
def test_experts_join_as_they_get_tokens_and_few_tokens_leave_them_dense(recipe):
    torch.manual_seed(0)
    model = Routed().eval()
    batches = [(drawn(60, WIDTH, seed=s), (0,)) for s in range(6)] + [(drawn(60, WIDTH, seed=9), (0, 1))]
    batches += [(drawn(5, WIDTH, seed=8), (2,))]  # the eighth: held out
    plan = rana_fx.adapt(model, batches, budget=0.7, recipe=recipe, progress=False)
    adapted = {site.rpartition(".")[0] for made in plan.adapters for site in made.sites}
    assert {"experts.0", "experts.1"} <= adapted
    assert {site.name.rpartition(".")[0] for site in plan.sites} == {"experts.0", "experts.1", "experts.2"}
    if recipe == "paper":
        reasons = {skip.site: skip.reason for skip in plan.left}
        assert reasons["experts.2.up"].startswith("sees 5 rows where other layers see 420: too few for 16 ranks")


class Divided(nn.Module):
    """Three linears of one tensor, one of them in some batches only."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, values=True):
        y = self.q(x) + self.k(x)
        return x + torch.tanh(y + self.v(x) if values else y)


@pytest.mark.parametrize("keep", [Keep(), Keep(64, moment=True)], ids=["rows", "moments"])
def test_groups_divide_when_a_later_batch_reads_some_of_their_linears(keep):
    """What was sampled of the whole group counts for each part."""
    batches = [(drawn(30, WIDTH, seed=seed), seed < 2) for seed in range(3)]
    found = sampled(Divided(), batches, lambda layout: dict.fromkeys(every_group(layout), keep))
    seen = {sites: sample.seen + getattr(sample, "summed", 0) for sites, sample in found.samples.items()}
    assert seen == {("v",): 60, ("q",): 90, ("k",): 90}


def test_a_large_batch_with_something_new_is_run_again_for_that_alone():
    """Nothing is counted twice."""
    large = {"x": drawn(64, 65, WIDTH, seed=1), "pixels": drawn(64, 2, WIDTH, seed=2)}
    found = sampled(seeing(), [*of_text(1), large])
    assert found.samples[found.layout.sites_of_group("vision.0.up")].seen == 128
    assert found.samples[found.layout.sites_of_group("text.0.up")].seen == 64 + 64 * 67


def test_batches_that_judge_run_every_linear_in_any_order():
    kept = []
    for batches in (of_text(9) + of_images(3), of_images(3) + of_text(9)):
        tee = Tee(batches)
        sampled(seeing(), tee)
        assert tee.mixed
        holdout = tee.holdout(nn.Identity())
        kept.append([[float(batch["x"].sum()) for batch in part] for part in (holdout.batches, holdout.held)])
        assert sum("pixels" in batch for batch in holdout.held) == 1 and len(holdout.held) == 2
        assert sum("pixels" in batch for batch in holdout.batches) == 2
        assert not {id(batch) for batch in holdout.held} & {id(batch) for batch in holdout.batches}
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("known", "names", "expected"),
    [("abc", "abxc", "abxc"), ("abc", "xbc", "axbc"), ("abc", "xy", "abcxy"), ("", "ab", "ab"), ("ab", "aybz", "aybz")],
)
def test_names_are_put_behind_those_that_they_follow(known, names, expected):
    assert "".join(spliced(list(known), list(names))) == expected
