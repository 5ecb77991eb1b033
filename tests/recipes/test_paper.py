"""recipe="paper" against an independent fp64 implementation of the published algorithms (tests/support/oracle.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf

import rana_fx
from rana_fx.evaluation.measure import measuring
from tests.support import oracle

BUDGET, DEPTH = 0.6, 2
# a threshold comes from a histogram of 1024 bins to an octave, the oracle's from sorting
THRESHOLD = 2e-3
# a score this close to its threshold may be kept or dropped in fp32: tokens that it can affect are left out
NEAR = 1e-5
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    build: Callable[[], Any]
    layer: str
    stack: tuple[str, ...]
    out: str
    ups: tuple[str, ...]
    down: str
    act: Callable[..., torch.Tensor]


def silu_gated(gate, up):
    return torch.nn.functional.silu(gate) * up


FAMILIES = {
    "llama": Family(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, num_key_value_heads=2)),
        "model.layers.{}.",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
        silu_gated,
    ),
    "llama with biases": Family(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True)),
        "model.layers.{}.",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
        silu_gated,
    ),
    "falcon, no biases": Family(
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(**_SIZES, ffn_hidden_size=96, bias=False, parallel_attn=False, multi_query=False)
        ),
        "transformer.h.{}.",
        ("self_attention.query_key_value",),
        "self_attention.dense",
        ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
        torch.nn.functional.gelu,
    ),
    "gpt_neox": Family(
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES)),
        "gpt_neox.layers.{}.",
        ("attention.query_key_value",),
        "attention.dense",
        ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
        torch.nn.functional.gelu,
    ),
}


@dataclass
class Case:
    """One model family: the model with its plan attached, and the oracle's results on the same tokens."""

    model: Any
    batches: list[dict[str, torch.Tensor]]
    plan: rana_fx.Plan
    ranks: dict[tuple[str, ...], oracle.Rank]  # by the sites stacked
    neurons: dict[str, oracle.Neuron]
    mlps: dict[str, oracle.Mlp]  # by the down projection
    fraction: float
    stacks: list[tuple[str, ...]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    torch.manual_seed(3)
    family = FAMILIES[request.param]
    model = family.build().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif parameter is not None and parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)  # biases and gains of norms that affect the output
    batches = [{"input_ids": torch.randint(3, 93, (4, 25)), "use_cache": False} for _ in range(4)]

    layers = [family.layer.format(index) for index in range(DEPTH)]
    stacks = [tuple(layer + name for name in family.stack) for layer in layers]
    blocks = [(tuple(layer + name for name in family.ups), layer + family.down) for layer in layers]
    weights = {name.removesuffix(".weight"): p.detach().double() for name, p in model.named_parameters()}
    biases = {name.removesuffix(".bias"): p.detach().double() for name, p in model.named_parameters() if name.endswith(".bias")}

    adapted = sum(weights[name].numel() for stack in stacks for name in stack)
    adapted += sum(weights[name].numel() for ups, down in blocks for name in (*ups, down))
    dense = sum(weights[layer + family.out].numel() for layer in layers)
    fraction = (BUDGET * (adapted + dense) - dense) / adapted

    rows = oracle.inputs(model, [stack[0] for stack in stacks] + [ups[0] for ups, _ in blocks], batches)
    ranks, neurons, mlps = {}, {}, {}
    for stack in stacks:
        ranks[stack] = oracle.rank_adapter(torch.cat([weights[name] for name in stack]), rows[stack[0]], fraction)
    for ups, down in blocks:
        best = oracle.mlp(
            [weights[up] for up in ups], [biases.get(up) for up in ups], weights[down], family.act, rows[ups[0]], fraction
        )
        ranks |= {(up,): rank for up, rank in zip(ups, best.ups, strict=True)}
        neurons[down], mlps[down] = best.down, best

    plan = rana_fx.adapt(model, batches, budget=BUDGET, recipe="paper", progress=False)
    return Case(model, batches, plan, ranks, neurons, mlps, fraction, stacks)


def neuron_threshold(plan, name, norms):
    """On |h_j| |W_:,j|, from the plan's thresholds on h_j^2: one for all inputs."""
    found = plan.adapter_of(name).tau.double().sqrt() * norms
    assert float(found.max() / found.min()) == pytest.approx(1, rel=1e-6)
    return float(found.mean())


def test_adapts_what_the_method_adapts(case):
    expected = {name for sites in case.ranks for name in sites} | set(case.neurons)
    assert {name for adapter in case.plan.adapters for name in adapter.sites} == expected
    assert case.plan.expected_budget() == pytest.approx(BUDGET, abs=1e-9)


def test_rank_kept_and_threshold(case):
    for sites, rank in case.ranks.items():
        adapter = case.plan.adapter_of(sites[0])
        assert (adapter.kind, adapter.sites, adapter.ranks) == ("rank", sites, rank.rank)
        assert adapter.kept == pytest.approx(rank.kept, rel=1e-9), sites
        assert adapter.tau.unique().tolist() == [pytest.approx(rank.threshold, rel=THRESHOLD)], sites
        if sites in case.stacks:
            assert 1 - adapter.error == pytest.approx(rank.coverage, abs=1e-4), sites


def test_basis_up_to_sign(case):
    for sites, rank in case.ranks.items():
        adapter = case.plan.adapter_of(sites[0])
        for found, expected in ((adapter.router, rank.b), (adapter.weight.t(), rank.a)):
            # the inner product of each component with its counterpart is plus or minus its energy
            axis = 1 if found.shape == rank.b.shape and found is adapter.router else 0
            overlap = (found.double() * expected).sum(axis).abs() / expected.square().sum(axis)
            assert overlap.tolist() == pytest.approx([1.0] * rank.rank, abs=1e-4), sites


def test_neuron_threshold_and_split(case):
    for name, neuron in case.neurons.items():
        adapter = case.plan.adapter_of(name)
        assert adapter.density == pytest.approx(neuron.fraction, rel=1e-9), case.mlps[name].errors
        threshold = neuron_threshold(case.plan, name, neuron.weight.norm(dim=0))
        assert threshold == pytest.approx(neuron.threshold, rel=THRESHOLD)


def test_logits(case):
    """The plan's thresholds in the oracle's own bases, in fp64, against the rewritten graph in fp32."""
    double = copy.deepcopy(case.model).double()
    near: list[torch.Tensor] = []  # per linear: tokens with a score about its threshold

    def watched(adapter, threshold, rows=slice(None)):
        def output(x):
            near.append(((adapter.scores(x) / threshold - 1).abs() < NEAR).any(-1))
            return adapter.output(x, threshold)[..., rows]

        return output

    outputs = {}
    for sites, rank in case.ranks.items():
        start = 0
        for name in sites:
            stop = start + double.get_submodule(name).out_features
            outputs[name] = watched(rank, float(case.plan.adapter_of(name).tau[0]), slice(start, stop))
            start = stop
    for name, neuron in case.neurons.items():
        outputs[name] = watched(neuron, neuron_threshold(case.plan, name, neuron.weight.norm(dim=0)))

    got, expected, sound = [], [], []
    with measuring(case.model) as meter:
        got = [meter.run(batch).logits for batch in case.batches]
    with torch.no_grad(), oracle.masked(double, outputs):
        for batch in case.batches:
            near.clear()
            expected.append(double(**batch).logits)
            # a flipped mask affects all later tokens of its sequence
            sound.append(torch.stack(near).any(0).cumsum(1) == 0)
    keep = torch.cat(sound)
    assert keep.double().mean() > 0.5
    error = (torch.cat(got).double() - torch.cat(expected))[keep]
    # fp32 through a dozen matmuls, each of relative error about sqrt(64) * 2^-24 = 5e-7
    assert float(error.norm() / torch.cat(expected)[keep].norm()) < 1e-5

    # the input of the first attention is that of the dense model, so its density is the target
    first = case.plan.adapter_of(case.stacks[0][0])
    assert meter.result().density[first.name] * first.ranks == pytest.approx(first.kept, rel=5e-3)
