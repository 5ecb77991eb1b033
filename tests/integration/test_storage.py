"""Plans in 8 and 4 bits through the rewrite and the compiler: results are those of the stored values, in any storage."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.adapter import Adapter
from rana_fx.calibration.batches import call
from rana_fx.evaluation.measure import measuring
from rana_fx.formats import unpack
from rana_fx.kernels.ops import masked_gemv
from rana_fx.passes.runner import run
from tests.support.adapted import layouts
from tests.support.architectures import output
from tests.support.side_by_side import SideBySide
from tests.support.storages import STORAGES, dense_sites, rebuilt, stored_in_turn, stored_matrix, stored_plan, twin_of


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def wide(batch):
    return torch.utils._pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, batch)


# through Inductor on whole models; every operation in every storage is lowered by itself in test_lowerings.py
LOWERED = ("hybrid, router 4, factors 4", "neuron, own weight")


# gpt2, whose weights are transposed, with every storage in one graph, the others with four or more of them
KEPT = {"gpt2": (3, 0), "llama": (1, 0), "gpt_neox": (1, 4), "bert": (1, 8), "phi3": (1, 2)}


def compiled(model, batch, how):
    torch.compiler.reset()
    with torch.no_grad():
        return output(call(torch.compile(model, backend=how), batch))


@pytest.mark.parametrize("name", KEPT)
def test_everything_kept_is_the_matrix_that_is_stored(name):
    depth, first = KEPT[name]
    storages = [*STORAGES][first:] + [*STORAGES][:first]
    model, batch, plan = stored_in_turn(name, depth, storages)
    with torch.no_grad():
        expected = output(call(twin_of(name, depth, plan), wide(batch)))
    rana_fx.attach(model, plan)
    with measuring(model) as meter:
        got = output(meter.run(batch))
    # fp32 against fp64: the oracle holds W^ rounded to fp32
    assert relative(got, expected) < 1e-5
    if name == "gpt2":  # llama follows below, with masks
        assert relative(compiled(model, batch, rewritten), expected) < 1e-5
    measured = meter.result()
    assert set(measured.density.values()) == {1.0}
    assert measured.budget_bytes == pytest.approx(plan.expected_budget("bytes"))


def test_everything_kept_through_inductor():
    """Many tokens, transposed weights."""
    model, batch, plan = stored_in_turn("gpt2", 1, LOWERED)
    with torch.no_grad():
        expected = output(call(twin_of("gpt2", 1, plan), wide(batch)))
    rana_fx.attach(model, plan)
    assert relative(compiled(model, batch, rana_fx.backend), expected) < 1e-5


@pytest.mark.parametrize("name", ["plain_llama", "gpt2"])
@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_stored_is_the_weight_within_half_a_step(name, storage):
    """|A^ B^ - A B| <= |dA| |B| + |A^| |dB|, where a stored number is off by half a step of its row or group."""
    _, _, plan = stored_plan(name, 1, storage)
    sites = dense_sites(name, 1)
    for adapter in plan.adapters:
        dense = torch.cat([sites[site].matrix() for site in adapter.sites]).double()
        weight, off = _and_its_error(adapter.weight, adapter.weight_scale)
        if adapter.router is None:
            bound = off.t()
        else:
            router, router_off = _and_its_error(adapter.router, adapter.router_scale)
            if adapter.router_tau is not None:
                router, router_off = router.t(), router_off.t()
            bound = off.t() @ (router.abs() + router_off) + weight.t().abs() @ router_off
        eps = torch.finfo(torch.float32).eps  # rounding of the fp32 numbers
        slack = 4 * eps * (dense.abs() + weight.shape[0] * weight.abs().max())
        assert ((stored_matrix(adapter) - dense).abs() <= bound + slack).all()


def _and_its_error(matrix, scale):
    """(stored matrix, half a step of each number), fp64."""
    wide = unpack(matrix, scale, torch.float64)
    if scale is None:
        return wide, torch.zeros_like(wide)
    steps = scale.double().unsqueeze(1) if matrix.dtype == torch.int8 else scale.double()
    steps = steps.repeat_interleave(-(-wide.shape[1] // steps.shape[1]) if steps.shape[1] == 1 else 64, 1)
    return wide, steps[:, : wide.shape[1]].expand_as(wide) / 2


def with_masks(plan, density, seed=0):
    """Thresholds of zero and infinity: masks do not depend on rounding."""
    generator = torch.Generator().manual_seed(seed)

    def mask(length):
        return torch.where(torch.rand(length, generator=generator) < density, 0.0, float("inf"))

    adapters = []
    for adapter in plan.adapters:
        changes = {"tau": mask(adapter.ranks), "kept": density * adapter.ranks}
        if adapter.router_tau is not None:
            changes |= {"router_tau": mask(adapter.width), "router_kept": density * adapter.width}
        adapters.append(replace(adapter, **changes).costed())
    return replace(plan, adapters=tuple(adapters))


def test_masked_and_compiled_equals_fp64():
    """One graph of all storages, every other one with a shift; of those with and without, some are of stacks."""
    storages = [*STORAGES][::2] + [*STORAGES][1::2]
    model, batch, plan = stored_in_turn("plain_llama", 3, storages)
    _, _, shifted = stored_in_turn("plain_llama", 3, storages, shift=0.3)
    chosen = tuple(
        pair[storage in storages[5:]]
        for pair, storage in zip(zip(plan.adapters, shifted.adapters, strict=True), itertools.cycle(storages), strict=False)
    )
    plan = replace(plan, adapters=chosen)
    both = zip(plan.adapters, with_masks(plan, 0.6).adapters, strict=True)
    plan = replace(plan, adapters=tuple(whole if whole.kind == "stored" else masked for whole, masked in both))
    assert sum(adapter.shift is not None for adapter in plan.adapters) == 5
    twin = twin_of("plain_llama", 3, plan)
    rana_fx.attach(model, plan)
    few = {"input_ids": batch["input_ids"][:1, :3]}  # few tokens have separate kernels
    for tokens, how in ((batch, rewritten), (few, rana_fx.backend)):
        with torch.no_grad():
            expected = output(twin(**tokens))
        assert relative(compiled(model, tokens, how), expected) < 1e-5
    with measuring(model) as meter:
        assert relative(output(meter.run(tokens)), expected) < 1e-5


def test_the_models_own_weight_with_a_shift():
    """The bias of the adapter replaces the linear's bias: W (x - mu) + (b + W mu)."""
    model, batch, plan = stored_plan("gpt2", 1, "stored, 8", shift=0.2)
    sites = dense_sites("gpt2", 1)
    single = [adapter for adapter in plan.adapters if len(adapter.sites) == 1]
    assert all(sites[adapter.sites[0]].bias is not None for adapter in single)
    adapters = []
    for adapter in single:
        site = sites[adapter.sites[0]]
        c = site.bias.detach() + site.matrix() @ adapter.shift
        adapters.append(replace(adapter, kind="neuron", weight=None, weight_scale=None, bias=c))
    with torch.no_grad():
        dense = output(call(model, batch))
    rana_fx.attach(model, replace(plan, adapters=tuple(adapters)))
    with measuring(model) as meter:
        assert relative(output(meter.run(batch)), dense) < 1e-5
    # the shift changes which values are small
    large = tuple(replace(a, tau=torch.full_like(a.tau, float("inf"))) for a in adapters)
    rana_fx.attach(model, replace(plan, adapters=large))
    with measuring(model) as meter:
        assert relative(output(meter.run(batch)), dense) > 1e-3
    assert set(meter.result().density.values()) == {0.0}


def test_thresholds_and_what_a_masked_router_reads_are_measured():
    model, batch, plan = stored_plan("plain_llama", 1, "hybrid, router 8")
    adapters = tuple(
        replace(adapter, router_tau=torch.full_like(adapter.router_tau, 0.3), tau=torch.full_like(adapter.tau, 0.5))
        for adapter in plan.adapters
    )
    plan = replace(plan, adapters=adapters)
    rana_fx.attach(model, plan)
    with measuring(model) as meter:
        expected = output(meter.run(batch))
    found = meter.result()
    assert found.density.keys() == found.router_density.keys() == {adapter.name for adapter in adapters}
    assert all(0 < value < 1 for value in (*found.density.values(), *found.router_density.values()))
    with torch.no_grad():
        assert relative(output(torch.compile(model, backend=rewritten)(**batch)), expected) < 1e-5
    dense = sum(site.cost("bytes") for site in plan.sites if site.counted)
    total = dense + sum(
        adapter.width * found.router_density[adapter.name] * (adapter.ranks + 4)  # 8 bits, and the scale of the row
        + adapter.ranks * found.density[adapter.name] * 4 * adapter.out
        - adapter.dense_bytes
        for adapter in adapters
    )  # fmt: skip
    assert found.budget_bytes == pytest.approx(total / dense)
    assert plan.expected_budget("bytes") > found.budget_bytes


def test_gradients_pass_through_what_is_stored():
    model, batch, plan = stored_plan("plain_llama", 1, "hybrid, router 4, factors 4")
    rana_fx.attach(model, with_masks(plan, 0.7))
    reference = copy.deepcopy(model)

    grads = []
    for one, how in ((model, rana_fx.backend), (reference, rewritten)):
        output(torch.compile(one, backend=how)(**batch)).square().mean().backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() >= {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"}
    for name, grad in grads[1].items():
        assert relative(grads[0][name], grad) < 1e-4, name


@pytest.mark.parametrize("lowered", [False, True])
def test_autocast(lowered):
    """Four storages in one graph: each is of a single linear through Inductor and of a stack as rewritten, or the other way."""
    storages = ["rank, router 8", "hybrid, router 4, factors 4", "neuron, own weight", "stored, 8"]
    if lowered:
        storages.reverse()
    model, batch, plan = stored_in_turn("plain_llama", 1, storages, shift=0.1)
    rana_fx.attach(model, plan)
    with torch.no_grad():
        expected = output(twin_of("plain_llama", 1, plan)(**batch))
    with torch.autocast("cpu", torch.bfloat16):
        got = compiled(model, batch, rana_fx.backend if lowered else rewritten)
    assert got.dtype == torch.bfloat16
    # a step of bf16 is 1 / 128; about ten tensors of one layer are rounded by at most half of it, and add up as a random walk
    assert relative(got, expected) < 10**0.5 / 256 * 2


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_plan_given_as_an_option():
    model, batch, plan = stored_plan("plain_llama", 1, "hybrid, router 4, factors 4")
    with torch.no_grad():
        expected = output(twin_of("plain_llama", 1, plan)(**batch))
        got = output(torch.compile(model, backend=rana_fx.backend, options={"plan": plan})(**batch))
    assert relative(got, expected) < 1e-5


class Attention(torch.nn.Module):
    """Its linears can be called separately, for graphs with only some of them."""

    def __init__(self, q, k, v):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(64, out) for out in (q, k, v))
        self.o = torch.nn.Linear(v, 64)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + self.o(torch.sigmoid(q.mean(-1, keepdim=True) * k.mean(-1, keepdim=True)) * v)


SIZES = [(48, 36, 22), (128, 64, 64), (64, 130, 2)]
NAMES = ("q", "k", "v")
# storage and sizes of each module of one model
MODULES = [*((storage, SIZES[i % 3]) for i, storage in enumerate(STORAGES)), *(("rank, factors 4", size) for size in SIZES[:2])]


def stacks():
    """(a model with a plan attached that adapts q, k and v of each module, the adapters, the linears)."""
    model = SideBySide(Attention(*sizes) for _, sizes in MODULES)
    batch = ([torch.randn(2, 40, 64) for _ in MODULES],)
    with layouts() as found:
        plan = rana_fx.adapt(model, [batch], budget=1.0, recipe="dense", progress=False)
    sites, adapters = found[0].sites, []
    for index, (storage, sizes) in enumerate(MODULES):
        names = tuple(f"parts.{index}.{name}" for name in NAMES)
        bare = Adapter(
            name="+".join(names), kind="stored", sites=names, ranks=64, kept=64.0, tau=torch.zeros(64),
            weight=torch.zeros(64, sum(sizes)), dense_flops=64.0 * sum(sizes), dense_bytes=256.0 * sum(sizes),
            bias=torch.cat([sites[name].bias.detach() for name in names]),
        )  # fmt: skip
        adapters.append(rebuilt(bare, sites, storage))
    rana_fx.attach(model, replace(plan, adapters=tuple(adapters)))
    return model, adapters, sites


def test_some_of_the_linears_are_in_the_graph():
    torch.manual_seed(0)
    model, adapters, sites = stacks()
    xs = [torch.randn(3, 64) for _ in MODULES]
    for asked in (("q", "v"), ("k",), ("v", "k", "q"), ("v", "v", "q")):

        def some(xs, chosen, asked=asked):
            return [[getattr(model.parts[i], name)(xs[i]) for name in asked] for i in chosen]

        seen = []

        def look(gm, example_inputs, seen=seen):
            result = run(gm, example_inputs)
            products = Counter(n.meta["rana"].adapter for n in gm.graph.nodes if n.target is masked_gemv)
            seen.append((sum(result.replaced.values()), products))
            return gm.forward

        everywhere = range(len(MODULES))
        torch.compiler.reset()
        with torch.no_grad():
            found = [(everywhere, torch.compile(some, backend=look)(xs, everywhere))]
            if asked == ("q", "v"):
                first = [i for i in everywhere if MODULES[i][1] == SIZES[0]]
                found.append((first, torch.compile(some, backend=rana_fx.backend)(xs, first)))
        ((replaced, products),) = seen
        assert replaced == len(asked) * len(MODULES)
        assert products == {a.name: products_of(a, MODULES[i][1], asked) for i, a in enumerate(adapters)}
        for chosen, got in found:
            for i, outputs in zip(chosen, got, strict=True):
                parts = stored_matrix(adapters[i]).split(MODULES[i][1])
                for name, y in zip(asked, outputs, strict=True):
                    right = xs[i].double() @ parts[NAMES.index(name)].t() + sites[f"parts.{i}.{name}"].bias.detach().double()
                    assert relative(y, right) < 1e-5, (MODULES[i], asked, name)


def products_of(adapter, sizes, asked):
    """Of all linears, in any order: one matmul. Of some: one for each, or one for all whose columns are not contiguous."""
    apart = [in_one_piece(adapter, sizes, NAMES.index(name)) for name in asked]
    expected = 1 if set(asked) == set(NAMES) else sum(apart) + (not all(apart))
    return expected + (adapter.router_tau is not None)


def in_one_piece(adapter, sizes, index):
    """Whether the columns of a site can be sliced: with 4 bits they must begin and end at groups of 64."""
    start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
    return adapter.weight.dtype != torch.uint8 or (start % 64 == 0 and (stop % 64 == 0 or stop == sum(sizes)))
