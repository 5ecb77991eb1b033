"""Modes of the option "prefill": weights that a prompt reads, and weights in memory."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import rana_fx
from rana_fx.dense_memory import free_, is_freed, unshared
from rana_fx.errors import InvalidOption, WeightsFreed
from rana_fx.evaluation.measure import measuring
from rana_fx.runtime.attachment import attached
from rana_fx.runtime.prefill import MODES, costs_more, memory_of
from tests.support.adapted import EVERY, adapted, relative
from tests.support.architectures import build, ids, make, output
from tests.support.by_hand import outputs_by_hand

# the subject is which weights a graph reads, not how Inductor multiplies by them
AS_REWRITTEN = pytest.mark.usefixtures("graphs_as_rewritten")


def bytes_of(model):
    """Bytes of weights and factors in memory, each storage once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def masked(model, batches):
    return outputs_by_hand(model, *batches)


@pytest.mark.parametrize(("dynamic", "lowered"), [(None, True), (None, False), (True, False)])
def test_factors_frees_what_they_replace(dynamic, lowered, request):
    """Prompt, then decoding; each twice; the same results as before."""
    if not lowered:
        request.getfixturevalue("graphs_as_rewritten")
    model, _, plan = adapted(depth=1 if lowered else 2, budget=0.75)
    batches = [ids(tokens) for tokens in ((12, 1) if lowered else (12, 1, 9, 2, 1))]
    expected = masked(model, batches)
    before, report = bytes_of(model), rana_fx.explain(model, batches[0])
    compiled = torch.compile(model, backend=rana_fx.backend, options={"prefill": "factors"}, dynamic=dynamic)
    with torch.no_grad():
        for _ in range(2):
            for batch, right in zip(batches, expected, strict=True):
                assert relative(output(compiled(**batch)), right) < 1e-5
    weights = {name.removesuffix(".weight"): p for name, p in model.named_parameters()}
    replaced = {site for adapter in plan.adapters if adapter.router is not None for site in adapter.sites}
    assert {name.rsplit(".", 1)[-1] for name in replaced} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert {name for name, weight in weights.items() if is_freed(weight)} == replaced
    # one element of each remains
    saved = sum(weights[name].numel() - 1 for name in replaced) * 4
    assert before - bytes_of(model) == saved
    facts = report.memory
    assert facts["prefill=masked"] - facts["prefill=factors"] == saved + 4 * len(replaced)


@AS_REWRITTEN
def test_a_freed_model_runs_by_its_plan_alone():
    model, batch, plan = adapted(budget=0.75)
    (expected,) = masked(model, [batch])
    saved = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        torch.compile(model, backend=rana_fx.backend, options={"prefill": "factors"})(**batch)
        name, weight = next((n, p) for n, p in model.named_parameters() if is_freed(p))
        assert "nan" in repr(weight)  # guards print Parameters
        assert model.state_dict()[name].isnan().all()
        assert output(model(**batch)).isnan().all()
    # measured as before, also after compilation in another mode without dense weights
    with measuring(model) as meter:
        assert relative(output(meter.run(batch)), expected) < 1e-5
    with torch.no_grad():
        assert relative(output(torch.compile(model, backend=rana_fx.backend)(**batch)), expected) < 1e-5
        torch.compiler.reset()
        assert 2 * batch["input_ids"].shape[1] > 16
        with pytest.raises(BackendCompilerFailed, match="its dense weight was freed") as caught:
            torch.compile(model, backend=rana_fx.backend, options={"prefill": "dense"})(**batch)
        assert isinstance(caught.value.inner_exception, WeightsFreed)
    for act in (lambda: rana_fx.detach(model), lambda: rana_fx.attach(model, plan), lambda: rana_fx.explain(model, batch)):
        with pytest.raises(WeightsFreed, match="q_proj.*load its checkpoint again to"):
            act()
    assert attached(model) is not None
    with pytest.raises(RuntimeError, match="more than one element"):
        model.load_state_dict(saved)
    # loading the weights restores the model
    model.load_state_dict(saved, assign=True)
    assert not any(map(is_freed, model.parameters()))


@AS_REWRITTEN
def test_factors_by_pieces_of_a_model():
    """Graph breaks: one code object, a graph per layer, each frees its own."""
    model, batch, plan = adapted(depth=2, budget=0.75)
    (expected,) = masked(model, [batch])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, backend=rana_fx.backend, options={"prefill": "factors"})
        for _ in range(3):
            assert relative(output(model(**batch)), expected) < 1e-5
    own = [site for adapter in plan.adapters if adapter.router is not None for site in adapter.sites]
    assert sum(map(is_freed, model.parameters())) == len(own)


@AS_REWRITTEN
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "albert", "t5"])
def test_factors_in_other_architectures(name):
    """Weights stored (in, out), fused weights, one weight for all layers, biases: found from the graph only."""
    model, batch = make(EVERY[name], 2 if name == "albert" else 1)  # whose layers share their weights
    rana_fx.adapt(model, [batch, *(EVERY[name].inputs() for _ in range(4))], budget=0.8, recipe="paper", progress=False)
    (expected,) = masked(model, [batch])
    compiled = torch.compile(model, backend=rana_fx.backend, options={"prefill": "factors"})
    with torch.no_grad():
        for _ in range(3):
            assert relative(output(compiled(**batch)), expected) < 1e-4
    assert any(map(is_freed, model.parameters()))


@AS_REWRITTEN
def test_what_is_shared_is_kept():
    """A tied Parameter, memory under two Parameters, and a copy elsewhere that is none."""
    model, batch, plan = adapted(budget=0.75)
    rana_fx.detach(model)
    attention = model.model.layers[0].self_attn
    model.tied = nn.Module()
    model.tied.weight = attention.q_proj.weight
    model.other = nn.Parameter(attention.k_proj.weight.data[:4])
    model.register_buffer("third", attention.v_proj.weight.data.view(-1)[3:])
    rana_fx.attach(model, plan)
    (expected,) = masked(model, [batch])
    with torch.no_grad():
        got = output(torch.compile(model, backend=rana_fx.backend, options={"prefill": "factors"})(**batch))
    assert relative(got, expected) < 1e-5
    freed = {name for name, parameter in model.named_parameters() if is_freed(parameter)}
    assert not any("self_attn" in name for name in freed)
    assert any("up_proj" in name for name in freed)


def test_factors_needs_an_attached_plan_and_no_gradients():
    model, batch, plan = adapted(budget=0.75)
    with pytest.raises(BackendCompilerFailed, match="prefill='factors' is not valid: expected torch.no_grad") as caught:
        torch.compile(model, backend=rana_fx.backend, options={"prefill": "factors"})(**batch)
    assert isinstance(caught.value.inner_exception, InvalidOption)
    torch.compiler.reset()
    rana_fx.detach(model)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="expected a plan that is attached"):
        torch.compile(model, backend=rana_fx.backend, options={"prefill": "factors", "plan": plan})(**batch)
    assert not any(map(is_freed, model.parameters()))


@AS_REWRITTEN
def test_cheapest_leaves_linears_dense_whose_ranks_cost_more():
    model, _, plan = adapted(budget=0.9)
    dear = {adapter.name for adapter in plan.adapters if costs_more(plan, adapter)}
    assert dear
    # the same plan without those adapters
    rest = replace(plan, adapters=tuple(adapter for adapter in plan.adapters if adapter.name not in dear))
    few, many = ids(2), ids(12)
    with torch.no_grad():
        (expected,) = masked(model, [few])
        compiled = torch.compile(model, backend=rana_fx.backend, options={"prefill": "cheapest"})
        assert relative(output(compiled(**few)), expected) < 1e-5
        got = output(compiled(**many))
        torch.compiler.reset()
        rana_fx.attach(model, rest)
        assert relative(got, masked(model, [many])[0]) < 1e-5


def test_costs_more_counts_multiply_adds():
    _, _, plan = adapted(budget=0.75)
    for adapter in plan.adapters:
        records = [record for record in plan.sites if record.name in adapter.sites]
        dense = sum(record.in_features * record.out_features for record in records)
        factors = 0 if adapter.router is None else adapter.router.numel() + adapter.weight.numel()
        assert costs_more(plan, adapter) == (factors > dense)


def test_memory_in_the_report():
    model, batch, plan = adapted(budget=0.75)
    report = rana_fx.explain(model, batch)
    found = memory_of(plan)
    tensors = [value for adapter in plan.adapters for value in adapter.tensors().values()]
    assert found.factors == sum(value.nbytes for value in tensors)
    assert found.dense == sum(4 * record.in_features * record.out_features for record in plan.sites)
    assert report.memory["prefill=masked"] == found.dense + found.factors == found.total("cheapest")
    assert set(report.memory) == {"without a plan", "factors alone", *(f"prefill={mode}" for mode in MODES)}
    assert "linears in memory: without a plan" in str(report)
    rana_fx.detach(model)
    assert rana_fx.explain(model, batch).memory == {}


@AS_REWRITTEN
def test_second_process_frees_too(tmp_path):
    """Weights from a file, a plan from a folder: no state of the process that adapted."""
    model, batch, plan = adapted(budget=0.75)
    (expected,) = masked(model, [batch])
    rana_fx.detach(model)
    plan.save(tmp_path)
    memory = io.BytesIO()
    torch.save(model.state_dict(), memory)
    memory.seek(0)
    other, _ = build("plain_llama", 1)
    other.load_state_dict(torch.load(memory))
    rana_fx.attach(other, rana_fx.load_plan(tmp_path))
    with torch.no_grad():
        compiled = torch.compile(other, backend="rana", options={"prefill": "factors"})
        for _ in range(2):
            assert relative(output(compiled(**batch)), expected) < 1e-5
    assert any(map(is_freed, other.parameters()))


def test_free_and_unshared_by_themselves():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3, bias=False))
    assert unshared(model) == {id(parameter) for parameter in model.parameters()}
    weight = model[1].weight
    assert not is_freed(weight)
    free_(weight)
    assert is_freed(weight)
    assert (weight.shape, weight.dtype, weight.untyped_storage().nbytes()) == ((3, 4), torch.float32, 4)
    assert not is_freed(nn.Parameter(torch.zeros(1, 1)))
    assert not is_freed(nn.Parameter(torch.zeros(2, 2, device="meta")))
    weight.data = torch.ones(3, 4)
    assert not is_freed(weight)
