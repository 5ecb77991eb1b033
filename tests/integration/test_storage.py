"""Plans in 8 and 4 bits through the rewrite and the compiler: results are those of the stored values, in any storage."""

from __future__ import annotations

import copy
import itertools
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
from rana_fx.runtime.attachment import attach_unchecked
from tests.support.architectures import output
from tests.support.storages import STORAGES, dense_sites, rebuilt, sites_of, stored_layers, stored_matrix, stored_plan


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def unpacked(model, batch, plan):
    """The dense model in fp64 with the dequantised matrices of the plan."""
    twin = copy.deepcopy(model)
    sites = sites_of(twin, batch)
    with torch.no_grad():
        for adapter in plan.adapters:
            parts = stored_matrix(adapter).split([sites[name].out_features for name in adapter.sites])
            for name, part in zip(adapter.sites, parts, strict=True):
                sites[name].view.copy_(part)
    return twin.double()


def wide(batch):
    return torch.utils._pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, batch)


# through Inductor on whole models; every operation in every storage is lowered by itself in test_lowerings.py
LOWERED = ("rank, router 8", "hybrid, router 4, factors 4", "neuron, own weight")


# every storage on gpt2 (whose weights are transposed), one each on the others: tracing and storage interact in a few lines only
OTHERS = [
    (name, storage) for name, storage in zip(itertools.cycle(["llama", "gpt_neox", "bert", "phi3"]), STORAGES, strict=False)
]


@pytest.mark.parametrize(("name", "storage"), [*OTHERS, *(("gpt2", storage) for storage in STORAGES)])
def test_everything_kept_is_the_matrix_that_is_stored(name, storage):
    model, batch, plan = stored_plan(name, 1, storage)
    with torch.no_grad():
        expected = output(call(unpacked(model, batch, plan), wide(batch)))
    rana_fx.attach(model, plan)
    with measuring(model) as meter:
        got = output(meter.run(batch))
    # fp32 against fp64: the oracle holds W^ rounded to fp32
    assert relative(got, expected) < 1e-5
    if name == "gpt2":  # llama follows below, with masks
        with torch.no_grad():
            assert relative(output(call(torch.compile(model, backend=backend_for(storage)), batch)), expected) < 1e-5
    measured = meter.result()
    assert set(measured.density.values()) == {1.0}
    assert measured.budget_bytes == pytest.approx(plan.expected_budget("bytes"))


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


def backend_for(storage):
    return rana_fx.backend if storage in LOWERED[1:] else rewritten


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


def masked_matrices(plan):
    """The plan as fp64 matrices, with masked rows set to zero."""
    adapters = []
    for adapter in plan.adapters:
        keep = (adapter.tau == 0).double().unsqueeze(1)
        changes = {"weight": unpack(adapter.weight, adapter.weight_scale, torch.float64) * keep, "weight_scale": None}
        if adapter.router is not None:
            router = unpack(adapter.router, adapter.router_scale, torch.float64)
            if adapter.router_tau is not None:
                router = (router * (adapter.router_tau == 0).double().unsqueeze(1)).t()
            changes |= {"router": router, "router_scale": None, "router_tau": None, "router_kept": None}
        changes |= {key: getattr(adapter, key).double() for key in ("bias", "shift") if getattr(adapter, key) is not None}
        adapters.append(replace(adapter, tau=torch.zeros(adapter.ranks), **changes))
    return replace(plan, adapters=tuple(adapters))


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_masked_and_compiled_equals_fp64(shift):
    """A layer in every other storage: one graph of all of them."""
    storages = list(STORAGES)[bool(shift) :: 2]
    model, batch, plan = stored_layers("plain_llama", storages, shift=shift)
    both = zip(plan.adapters, with_masks(plan, 0.6).adapters, strict=True)
    plan = replace(plan, adapters=tuple(whole if whole.kind == "stored" else masked for whole, masked in both))
    twin = copy.deepcopy(model).double()
    attach_unchecked(twin, masked_matrices(plan))
    rana_fx.attach(model, plan)
    few = {"input_ids": batch["input_ids"][:1, :3]}  # few tokens have separate kernels
    for tokens, how in ((batch, rewritten), (few, rana_fx.backend)):
        with measuring(twin) as meter:
            expected = output(meter.run(tokens))
        with torch.no_grad():
            assert relative(output(torch.compile(model, backend=how)(**tokens)), expected) < 1e-5
        torch.compiler.reset()
    with measuring(model) as meter:
        assert relative(output(meter.run(tokens)), expected) < 1e-5
    assert sum(adapter.shift is not None for adapter in plan.adapters) == (len(plan.adapters) if shift else 0)


def test_the_models_own_weight_with_a_shift():
    """The bias of the adapter replaces the linear's bias: W (x - mu) + (b + W mu)."""
    model, batch, plan = stored_plan("gpt2", 1, "stored, 8", shift=0.2)
    sites = sites_of(model, batch)
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


@pytest.mark.parametrize("storage", ["rank, router 8", "hybrid, router 4, factors 4", "neuron, own weight", "stored, 8"])
def test_autocast(storage):
    model, batch, plan = stored_plan("plain_llama", 1, storage, shift=0.1)
    rana_fx.attach(model, plan)
    with measuring(model) as meter:
        expected = output(meter.run(batch))
    how = rana_fx.backend if storage in LOWERED[:2] else rewritten
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = output(torch.compile(model, backend=how)(**batch))
    assert got.dtype == torch.bfloat16
    # a step of bf16 is 1 / 128; about ten tensors of one layer are rounded by at most half of it, and add up as a random walk
    assert relative(got, expected) < 10**0.5 / 256 * 2


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_plan_given_as_an_option():
    model, batch, plan = stored_plan("plain_llama", 1, "hybrid, router 4, factors 4")
    rana_fx.attach(model, plan)
    with measuring(model) as meter:
        expected = output(meter.run(batch))
    rana_fx.detach(model)
    with torch.no_grad():
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


@pytest.mark.parametrize(
    ("storage", "sizes"),
    [*((storage, SIZES[i % 3]) for i, storage in enumerate(STORAGES)), *(("rank, factors 4", size) for size in SIZES[:2])],
)
def test_some_of_the_linears_are_in_the_graph(storage, sizes):
    torch.manual_seed(0)
    model = Attention(*sizes)
    batch = torch.randn(2, 80, 64)
    plan = rana_fx.adapt(model, [batch], budget=1.0, recipe="dense", progress=False)
    rana_fx.detach(model)
    sites = sites_of(model, batch)
    names = ("q", "k", "v")
    bare = Adapter(
        name="q+k+v", kind="stored", sites=names, ranks=64, kept=64.0, tau=torch.zeros(64), weight=torch.zeros(64, sum(sizes)),
        dense_flops=64.0 * sum(sizes), dense_bytes=256.0 * sum(sizes), bias=torch.cat([sites[n].bias.detach() for n in names]),
    )  # fmt: skip
    adapter = rebuilt(bare, sites, storage)
    rana_fx.attach(model, replace(plan, adapters=(adapter,)))
    parts = stored_matrix(adapter).split(sizes)
    x = torch.randn(3, 64)
    for asked in (("q", "v"), ("k",), ("v", "k", "q"), ("v", "v", "q")):

        def some(x, asked=asked):
            return [getattr(model, name)(x) for name in asked]

        seen = []

        def look(gm, example_inputs, seen=seen):
            result = run(gm, example_inputs)
            seen.append((sum(result.replaced.values()), [n.target for n in gm.graph.nodes].count(masked_gemv)))
            return gm.forward

        torch.compiler.reset()
        with torch.no_grad():
            found = [torch.compile(some, backend=look)(x)]
            if asked == ("q", "v") and sizes == SIZES[0]:
                found.append(torch.compile(some, backend=rana_fx.backend)(x))
        ((replaced, products),) = seen
        assert replaced == len(asked)
        # all of them, in any order: one matmul. Otherwise one for each, or one for all whose columns are not contiguous
        apart = [in_one_piece(adapter, sizes, names.index(name)) for name in asked]
        expected = 1 if set(asked) == set(names) else sum(apart) + (not all(apart))
        assert products == expected + (adapter.router_tau is not None)
        for got in found:
            for name, y in zip(asked, got, strict=True):
                right = x.double() @ parts[names.index(name)].t() + sites[name].bias.detach().double()
                assert relative(y, right) < 1e-5, (asked, name)


def in_one_piece(adapter, sizes, index):
    """Whether the columns of a site can be sliced: with 4 bits they must begin and end at groups of 64."""
    start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
    return adapter.weight.dtype != torch.uint8 or (start % 64 == 0 and (stop % 64 == 0 or stop == sum(sizes)))
