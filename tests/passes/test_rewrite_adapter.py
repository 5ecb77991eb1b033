"""The simulated adapter equals the rewritten graph: one definition, run inside the dense model and recorded into its graph.

Both results come from that definition; its correctness is tested against independent references (test_storage, test_exact_rows,
test_rewrite_gated).
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx import apply as definition
from rana_fx._backend import rewritten
from rana_fx.adapter import Adapter
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.holdout import Holdout
from rana_fx.evaluation.measure import measuring
from rana_fx.kernels.ops import masked_gemv, router
from rana_fx.passes.emit import Annotation
from rana_fx.recipes.simulate import AdapterSimulator
from tests.integration.test_storage import with_masks
from tests.support.architectures import build, output
from tests.support.exact import plan_for
from tests.support.graphs import recording
from tests.support.storages import STORAGES, rebuilt, sites_of, stored_plan
from tests.support.trained import EPS, adapted

RECIPES = ("paper", "teal", "cats", "rana")
FEW = ("rank, router 8", "teal", "cats", "exact", "hybrid, router 4, factors 4", "neuron, 4")
STACKED = (
    "rank, router 8",
    "rank, factors 4",
    "hybrid, router 4, factors 4",
    "neuron, own weight",
    "neuron, 4",
    "stored, 8",
)


def case(name):
    """(model without a plan, batch with padding, plan)."""
    if name in RECIPES:
        model, batch = adapted(name, depth=1)
        plan = rana_fx.detach(model)
    elif name == "exact":
        model, batch = build("plain_biased", 1)
        plan = plan_for(model, batch, ("up_proj",), ranks=8)
    else:
        storage = name.removesuffix(", shifted")
        model, batch, plan = stored_plan("plain_llama", 1, storage, shift=0.0 if storage == name else 0.3)
        plan = plan if storage.startswith("stored") else with_masks(plan, 0.6)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -3:] = 0
    return model, {**batch, "attention_mask": mask}, plan


def both(model, batch, plan, context=contextlib.nullcontext):
    """(output, kept share by adapter and part) simulated inside the dense model, and of the rewritten graph."""
    layout = calibrate(model, [batch], progress=False).layout
    with torch.no_grad(), context(), Holdout(model, (), ()).instrumented(layout) as stage:
        simulator = AdapterSimulator(stage, layout, plan.adapters)
        simulated = output(stage.run(batch, simulator.step))
    rana_fx.attach(model, plan)
    with context(), measuring(model) as meter:
        rewritten = output(meter.run(batch))
    rana_fx.detach(model)
    measured = meter.result()
    shares = {"tau": measured.density, "router_tau": measured.router_density, "exact_tau": measured.exact_density}
    sizes = {
        adapter.name: {"tau": adapter.ranks, "router_tau": adapter.width, "exact_tau": adapter.out} for adapter in plan.adapters
    }
    means = {
        part: {key: mean / sizes[key][part] for key, mean in simulator.means(part).items()}
        for part in ("tau", "router_tau", "exact_tau")
    }
    return (simulated, means), (rewritten, shares)


@functools.cache
def found(name):
    """``both`` of a case, and the output of the dense model."""
    model, batch, plan = case(name)
    with torch.no_grad():
        dense = output(model(**batch, use_cache=False))
    return *both(model, batch, plan), dense


@pytest.mark.parametrize("name", [*STORAGES, "rank, factors 4, shifted", "neuron, 4, shifted", *RECIPES, "exact"])
def test_simulated_is_rewritten(name):
    """The same operations on the same shapes, so the same bits; a row of exact outputs read alone is the row of all of them."""
    (simulated, means), (rewritten, shares), dense = found(name)
    assert torch.equal(simulated, rewritten)
    assert means["tau"]
    for part, counted in shares.items():
        assert means[part] == pytest.approx(counted, rel=1e-12), part
    assert not torch.equal(rewritten, dense)


@pytest.mark.parametrize("name", FEW)
def test_simulated_is_rewritten_under_autocast(name):
    (simulated, means), (rewritten, shares) = both(*case(name), lambda: torch.autocast("cpu", torch.bfloat16))
    assert torch.equal(simulated, rewritten) and means["tau"] == pytest.approx(shares["tau"], rel=1e-12)
    assert not torch.equal(rewritten, found(name)[1][0].to(rewritten.dtype))


@pytest.mark.parametrize("name", FEW)
def test_a_change_of_the_definition_changes_both(name, monkeypatch):
    (before, _), *_ = found(name)
    monkeypatch.setattr(definition, "masked_gemv", lambda v, *given: masked_gemv(1.5 * v, *given))
    (simulated, _), (rewritten, _) = both(*case(name))
    assert torch.equal(simulated, rewritten)
    assert float((simulated - before).norm() / before.norm()) > 1e-3


class Apart(nn.Module):
    """Linears over one input, of which a graph may hold some, behind a residual."""

    def __init__(self, widths):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, width) for width in widths)

    def forward(self, x, use):
        parts = {name: getattr(self, name)(x) for name in use}
        return x + sum(part.square().mean(-1, keepdim=True) for part in parts.values()), parts


def stacked(widths, storage):
    """(the model with q, k and v stacked in one adapter, its input)."""
    torch.manual_seed(0)
    model, x = Apart(widths), torch.randn(1, 48, 32)
    plan = rana_fx.adapt(model, [(x, "qkv")], budget=0.9, recipe="dense", progress=False)
    rana_fx.detach(model)
    sites = sites_of(model, (x, "qkv"))
    with torch.no_grad():
        whole = Adapter(
            name="q+k+v",
            kind="neuron",
            sites=("q", "k", "v"),
            ranks=32,
            kept=32.0,
            tau=torch.zeros(32),
            weight=torch.cat([sites[name].matrix() for name in "qkv"]).t().contiguous(),
            bias=torch.cat([sites[name].bias.detach() for name in "qkv"]),
            dense_flops=sum(record.cost("flops") for record in plan.sites),
            dense_bytes=sum(record.cost("bytes") for record in plan.sites),
        )
        made = rebuilt(whole, sites, storage)
        if storage == "neuron, own weight":
            made = replace(made, weight=None)
    rana_fx.attach(model, with_masks(replace(plan, adapters=(made,), skips=()), 0.6))
    return model, x


def parts_of(model, x, use):
    """(output of each linear, nodes of the rewritten graph)."""
    nodes = []
    torch.compiler.reset()
    with torch.no_grad():
        return torch.compile(model, backend=recording(nodes))(x, use)[1], nodes


@pytest.mark.parametrize("widths", [(64, 128, 64), (64, 32, 48)], ids=["whole groups", "groups cut"])
@pytest.mark.parametrize("storage", STACKED)
def test_some_linears_of_a_stack_yield_what_they_yield_with_the_others(storage, widths):
    model, x = stacked(widths, storage)
    whole, nodes = parts_of(model, x, "qkv")
    own = storage == "neuron, own weight"
    assert [node.target for node in nodes].count(masked_gemv) == (3 if own else 1) + storage.startswith("hybrid")
    packed = STORAGES[storage][2] == 4
    for use in ("qv", "k", "v"):
        parts, nodes = parts_of(model, x, use)
        targets = [node.target for node in nodes]
        # 4 bits: a linear whose columns begin or end inside a group slices the result of the whole stack, which is computed once
        alone = [not packed or widths == (64, 128, 64) or name == "q" for name in use]
        assert targets.count(masked_gemv) == sum(alone) + (not all(alone)) + storage.startswith("hybrid")
        assert targets.count(router) == (STORAGES[storage][1] is not None and not storage.startswith("hybrid"))
        for name, part in parts.items():
            # a sum of 32 terms in another order: each rounding is EPS / 2 of a partial sum
            torch.testing.assert_close(part, whole[name], rtol=0, atol=32 * EPS * float(whole[name].abs().max()))


def test_operations_name_their_adapter_and_part():
    model, x = stacked((64, 128, 64), "hybrid, router 4, factors 4")
    _, nodes = parts_of(model, x, "qkv")
    marked = [node for node in nodes if "rana" in node.meta]
    assert [node.meta["rana"] for node in marked] == [Annotation("q+k+v", "router_tau"), Annotation("q+k+v", "tau")]
    assert all(node.target is masked_gemv for node in marked)


class Returned(nn.Module):
    """Attention that returns its keys and values, as a layer does that leaves caching to its caller."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + self.o(nn.functional.scaled_dot_product_attention(q, k, v)), k, v.view(1, -1, 2, 8)


@pytest.mark.parametrize("tokens", [1, 3])
def test_columns_of_a_stacked_product_can_be_returned(tokens):
    """Of one token they lie in one piece of memory, side by side: a write into one is no write into another."""
    torch.manual_seed(0)
    model, x = Returned(), torch.randn(1, tokens, 16)
    plan = rana_fx.adapt(model, [torch.randn(1, 80, 16)], budget=0.9, recipe="static", progress=False)
    assert max(len(adapter.sites) for adapter in plan.adapters) == 3
    with torch.no_grad():
        found = torch.compile(model, backend=rewritten)(x)
        before = [value.clone() for value in found]
        for value in found:
            value.mul_(2)
    assert all(torch.equal(value, 2 * old) for value, old in zip(found, before, strict=True))
