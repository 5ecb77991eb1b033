"""The simulated adapter equals the rewritten graph: one definition, run inside the dense model and recorded into its graph.

Both results come from that definition; its correctness is tested against independent references (test_storage, test_exact_rows,
test_rewrite_gated).
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
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
from tests.support.adapted import layouts
from tests.support.architectures import build, output
from tests.support.exact import plan_for
from tests.support.graphs import recording
from tests.support.one_trace import one_trace
from tests.support.side_by_side import SideBySide
from tests.support.storages import STORAGES, rebuilt, stored_plan
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
    model.requires_grad_(False)  # as the simulator runs it
    with one_trace(model), context():
        layout = calibrate(model, [batch], progress=False).layout
        with torch.no_grad(), Holdout(model, (), ()).instrumented(layout) as stage:
            simulator = AdapterSimulator(stage, layout, plan.adapters)
            simulated = output(stage.run(batch, simulator.step))
        rana_fx.attach(model, plan)
        with measuring(model) as meter:
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


def stacked(cases):
    """(a module for each (widths, storage), with q, k and v stacked in one adapter, their inputs): one model with a plan."""
    torch.manual_seed(0)
    model, xs = SideBySide(Apart(widths) for widths, _ in cases), [torch.randn(1, 48, 32) for _ in cases]
    with layouts() as found:
        plan = rana_fx.adapt(model, [(xs, "qkv")], budget=0.9, recipe="dense", progress=False)
    rana_fx.detach(model)
    with torch.no_grad():
        made = tuple(one_stack(index, storage, plan, found[0].sites) for index, (_, storage) in enumerate(cases))
    rana_fx.attach(model, with_masks(replace(plan, adapters=made, skips=()), 0.6))
    return model, xs


def one_stack(index, storage, plan, sites):
    names = tuple(f"parts.{index}.{name}" for name in "qkv")
    records = [record for record in plan.sites if record.name in names]
    whole = Adapter(
        name=f"stack {index}",
        kind="neuron",
        sites=names,
        ranks=32,
        kept=32.0,
        tau=torch.zeros(32),
        weight=torch.cat([sites[name].matrix() for name in names]).t().contiguous(),
        bias=torch.cat([sites[name].bias.detach() for name in names]),
        dense_flops=sum(record.cost("flops") for record in records),
        dense_bytes=sum(record.cost("bytes") for record in records),
    )
    made = rebuilt(whole, sites, storage)
    return replace(made, weight=None) if storage == "neuron, own weight" else made


def parts_of(model, xs, use):
    """(output of each linear of each module, nodes of the rewritten graph by adapter)."""
    nodes, by_adapter = [], defaultdict(list)
    torch.compiler.reset()
    with torch.no_grad():
        parts = [parts for _, parts in torch.compile(model, backend=recording(nodes))(xs, use)]
    for node in nodes:
        if "rana" in node.meta:
            by_adapter[node.meta["rana"].adapter].append(node)
    assert sum(node.target in (masked_gemv, router) for node in nodes) == sum(map(len, by_adapter.values()))
    return parts, by_adapter


WHOLE, CUT = (64, 128, 64), (64, 32, 48)  # of groups of 64


def test_some_linears_of_a_stack_yield_what_they_yield_with_the_others():
    cases = [(widths, storage) for storage in STACKED for widths in (WHOLE, CUT)]
    model, xs = stacked(cases)
    wholes, nodes = parts_of(model, xs, "qkv")
    for index, (_, storage) in enumerate(cases):
        own = storage == "neuron, own weight"
        targets = [node.target for node in nodes[f"stack {index}"]]
        assert targets.count(masked_gemv) == (3 if own else 1) + storage.startswith("hybrid"), cases[index]
    for use in ("qv", "k", "v"):
        found, nodes = parts_of(model, xs, use)
        for index, ((widths, storage), parts, whole) in enumerate(zip(cases, found, wholes, strict=True)):
            targets = [node.target for node in nodes[f"stack {index}"]]
            # 4 bits: a linear whose columns begin or end inside a group slices the result of the whole stack, computed once
            alone = [STORAGES[storage][2] != 4 or widths == WHOLE or name == "q" for name in use]
            products = sum(alone) + (not all(alone)) + storage.startswith("hybrid")
            assert targets.count(masked_gemv) == products, (cases[index], use)
            assert targets.count(router) == (STORAGES[storage][1] is not None and not storage.startswith("hybrid"))
            for name, part in parts.items():
                # a sum of 32 terms in another order: each rounding is EPS / 2 of a partial sum
                torch.testing.assert_close(part, whole[name], rtol=0, atol=32 * EPS * float(whole[name].abs().max()))


def test_operations_name_their_adapter_and_part():
    model, xs = stacked([(WHOLE, "hybrid, router 4, factors 4")])
    _, nodes = parts_of(model, xs, "qkv")
    (marked,) = nodes.values()
    assert [node.meta["rana"] for node in marked] == [Annotation("stack 0", "router_tau"), Annotation("stack 0", "tau")]
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
