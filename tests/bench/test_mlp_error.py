"""Errors of MLP outputs against an fp64 reference, for adapters in every storage, stacked and masked."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import transformers

from bench.common.calibrated import calibrate_once
from bench.quality.block_error import AdaptedBlock, score
from rana_fx.recipes import neuron_adapter
from tests.support.storages import STORAGES, rebuilt, stored_matrix

IDS = torch.randint(64, (4, 40), generator=torch.Generator().manual_seed(0))
LLAMA = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, mlp_bias=True
)
NEOX = transformers.GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4)


@functools.cache
def calibrated(architecture):
    config = {"gated": LLAMA, "plain": NEOX}[architecture]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}]
    return calibrate_once(model, batches)


def problem_of(architecture, metric="flops"):
    problem = calibrated(architecture).problem(budget=0.5, metric=metric, recipe="dense")
    (block,) = problem.layout.blocks
    return problem, block


def whole(problem, names):
    """A neuron adapter of stacked sites that keeps all inputs, the input of ``rebuilt``."""
    first = problem.layout.sites[names[0]]
    made = neuron_adapter(problem, names[0], 0.0, torch.ones(first.in_features), 1.0)
    return replace(
        made, name="+".join(names), sites=names, dense_flops=problem.flops(names), dense_bytes=problem.bytes(names),
        weight=problem.matrix(names).t().contiguous(), bias=problem.bias(names),
    )  # fmt: skip


def reference(block, problem, weights, x):
    """(output, output without the bias of down) of the block in fp64, from matrices by site."""

    def times(name, rows):
        bias = problem.bias((name,))
        return rows @ weights[name].t() + (0.0 if bias is None else bias.double())

    hidden = block.pointwise(*(times(up, x) for up in block.ups))
    return times(block.down, hidden), hidden @ weights[block.down].t()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("architecture", ["gated", "plain"])
@torch.no_grad()
def test_errors_and_costs_of_every_storage(architecture, storage):
    for metric in ("flops", "bytes"):
        problem, block = problem_of(architecture, metric)
        sites = problem.layout.sites
        own = storage == "neuron, own weight"
        stacks = [*((up,) for up in block.ups), (block.down,)] if own else [block.ups, (block.down,)]
        adapters = [rebuilt(whole(problem, names), sites, storage, shift=0.2) for names in stacks]
        weights = {}
        for adapter in adapters:
            parts = stored_matrix(adapter).split([sites[name].out_features for name in adapter.sites])
            weights |= zip(adapter.sites, parts, strict=True)
        x = problem.rows(block.ups[0]).double()
        got, _ = reference(block, problem, weights, x)
        exact, energy = reference(block, problem, {name: sites[name].matrix().double() for name in block.sites}, x)
        expected = float((got - exact).square().sum() / energy.square().sum())
        error, cost = score(problem, block, adapters)
        # errors of fp32 matmuls are 2^-23 times a few hundred terms; errors of 4 bits are above 1e-4
        assert error == pytest.approx(expected, rel=1e-3, abs=1e-10)
        assert (expected > 1e-6) == ("4" in storage or "8" in storage)
        assert cost == pytest.approx(sum(a.cost(metric, a.ranks, a.router_kept) for a in adapters) / problem.size(block.sites))


@torch.no_grad()
def test_masks_of_a_hybrid_are_counted_and_act():
    problem, block = problem_of("gated")
    made = rebuilt(whole(problem, block.ups), problem.layout.sites, "hybrid")
    made = replace(made, router_tau=torch.linspace(0, 2, 32), tau=torch.linspace(0, 5, 32))
    down = neuron_adapter(problem, block.down, 0.5, torch.ones(80), 0.5)
    x = problem.rows(block.ups[0])
    adapted = AdaptedBlock(problem, block, [made, down])
    got = adapted.output(x)
    inputs = x.square() >= made.router_tau
    z = (x * inputs).double() @ made.router.double()
    ranks = z.square() >= made.tau
    ups = ((z * ranks) @ made.weight.double() + problem.bias(block.ups)).split(80, dim=1)
    hidden = block.pointwise(*ups)
    neurons = hidden.square() >= down.tau
    expected = (hidden * neurons) @ problem.matrix((block.down,)).t().double() + problem.bias((block.down,))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert adapted.sums["router_tau"] == {made.name: float(inputs.sum())} and 0 < float(inputs.float().mean()) < 1
    assert adapted.sums["tau"] == {made.name: float(ranks.sum()), down.name: float(neurons.sum())}
    mean = [float(mask.sum()) / len(x) for mask in (inputs, ranks, neurons)]
    spent = mean[0] * 32 + mean[1] * 160 + mean[2] * 32
    assert score(problem, block, [made, down])[1] == pytest.approx(spent / (3 * 32 * 80))


def test_linears_without_adapters_stay_dense():
    problem, block = problem_of("gated")
    with torch.no_grad():
        assert score(problem, block, []) == (pytest.approx(0.0, abs=1e-12), 1.0)
        down = neuron_adapter(problem, block.down, float("inf"), torch.ones(80), 0.0)
        assert score(problem, block, [down]) == (pytest.approx(1.0, rel=1e-5), pytest.approx(2 / 3))
