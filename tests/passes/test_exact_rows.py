"""Rank adapters that compute large outputs exactly: rewritten graphs against a reference, and extreme thresholds."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import rana_fx
from rana_fx.evaluation.measure import measuring
from rana_fx.kernels.ops import masked_gemv, masked_rows, router
from rana_fx.passes.emit import Annotation
from rana_fx.runtime.attachment import attached
from rana_fx.training import add_lora, lora_config
from tests.support.architectures import build, output
from tests.support.exact import FFN, FORMS, WIDTH, batch_of, by_hand, mlp, plan_for, without, written_out
from tests.support.graphs import recording
from tests.support.one_trace import one_trace
from tests.support.trained import compiled, gradients, relative

UPS = {"gpt_neox": "dense_h_to_4h", "gpt2": "c_fc", "opt": "fc1"}
FP64 = 1e-12


def graph_of(model, batch):
    """(output, nodes of the rewritten graph)."""
    nodes = []
    torch.compiler.reset()
    return output(torch.compile(model, backend=recording(nodes))(**batch)), nodes


def readers(nodes, name):
    """Nodes that read a Parameter of the graph, through views."""
    found, todo = set(), [node for node in nodes if node.op == "placeholder" and name in node.name]
    assert todo
    for node in todo:
        for user in node.users:
            if getattr(user.target, "__name__", user.target) in ("t", "mT", "getattr"):
                todo.append(user)
            else:
                found.add(user.target)
    return found


@pytest.mark.parametrize("activation", [F.gelu, F.relu])
@pytest.mark.parametrize("name", FORMS)
def test_large_outputs_are_the_models_own(name, activation):
    model, plan = mlp(FORMS[name], activation, dtype=torch.float64)
    batch = batch_of(dtype=torch.float64)
    expected, kept = by_hand(model, plan, batch)
    with torch.no_grad():
        got, nodes = graph_of(model, batch)
        plain = output(model(**batch))
    assert relative(got, expected) < FP64 < 1e-3 < relative(plain, expected)
    assert 0.1 < kept["up"] / FFN < 0.9
    targets = [node.target for node in nodes]
    assert (targets.count(router), targets.count(masked_gemv), targets.count(masked_rows)) == (1, 1, 1)
    # only down is a dense matmul, and of up only rows are read
    assert sum(getattr(target, "__name__", target) in ("linear", "addmm", "matmul", "einsum") for target in targets) == 1
    assert readers(nodes, "up_parameters_weight") == {masked_rows}
    (rows,) = [node for node in nodes if node.target is masked_rows]
    assert rows.meta["rana"] == Annotation("up", "exact_tau")
    assert rows.args[4] == plan.adapters[0].exact_density == 1 / 4


@pytest.mark.parametrize(("name", "depth"), [("gpt_neox", 2), ("gpt2", 1), ("opt", 1)])
def test_models_measure_what_a_hand_count_gives(name, depth):
    model, batch = build(name, depth)
    model = model.double()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, -4:] = 0
    with one_trace(model):
        plan = plan_for(model, batch, (UPS[name],), ranks=8)
        assert len(plan.adapters) == depth
        rana_fx.attach(model, plan)
        expected, kept = by_hand(model, plan, batch)
        with measuring(model) as meter:
            got, measured = output(meter.run(batch)), meter.result()
    assert relative(got, expected) < FP64
    assert measured.tokens == 20
    outs = {adapter.name: adapter.out for adapter in plan.adapters}
    assert measured.exact_density == pytest.approx({key: kept[key] / outs[key] for key in kept}, rel=1e-12)
    assert all(0 < share < 1 for share in measured.exact_density.values())
    # W's rows, beside the factors and everything dense
    for metric, found in (("flops", measured.budget_flops), ("bytes", measured.budget_bytes)):
        dense = sum(site.cost(metric) for site in plan.sites if site.counted)
        spent = dense
        for adapter in plan.adapters:
            width = 1 if metric == "flops" else 8
            ranks = adapter.ranks * (adapter.width + measured.density[adapter.name] * adapter.out)
            own = adapter.width * adapter.out
            spent += width * (ranks + kept[adapter.name] * adapter.width - own)
        assert found == pytest.approx(spent / dense, rel=1e-9)
    with torch.no_grad():
        _, nodes = graph_of(model, batch)
    assert sum(node.target is masked_rows for node in nodes) == depth


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "stored_by_inputs"])
def test_the_extremes_are_the_dense_linear_and_the_plain_adapter(name, dtype):
    batch = batch_of(dtype=dtype)
    always, _ = mlp(FORMS[name], dtype=dtype, tau=torch.full((FFN,), -torch.inf))
    never, plan = mlp(FORMS[name], dtype=dtype, tau=torch.full((FFN,), torch.inf))
    with torch.no_grad():
        dense = always(**batch)
        assert torch.equal(compiled(always)(**batch), dense)
        got = compiled(never)(**batch)
        rana_fx.attach(never, without(plan))
        plain = compiled(never)(**batch)
        assert torch.equal(got, plain)
        assert plain.dtype == dtype and relative(plain, dense) > 0.01


@given(st.integers(1, 9), st.sampled_from([1, 3, 16]), st.floats(-3, 3), st.integers(0, 99))
def test_the_operations_for_any_shape(tokens, ranks, level, seed):
    """The operations of the graph alone: rows that are not read have no effect, even if infinite."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(tokens, size, generator=generator) for size in (ranks, 7))
    weight, bias = torch.randn(7, ranks, generator=generator), torch.randn(7, generator=generator)
    gate = (y >= level).type_as(y)
    unread = ~gate.bool().any(0)
    weight[unread] = torch.inf
    got = torch.where(gate != 0, masked_rows(x, gate, weight, bias, 0.5), y)
    weight[unread] = 0
    expected = torch.where(y >= level, x.double() @ weight.double().t() + bias.double(), y.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_autocast_multiplies_in_the_dtype_of_the_dense_linear():
    batch = batch_of()
    model, _ = mlp(tau=torch.full((FFN,), -torch.inf))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        up, expected = model.up(batch["x"]), model(**batch)
        got, nodes = graph_of(model, batch)
    (rows,) = [node for node in nodes if node.target is masked_rows]
    assert rows.meta["example_value"].dtype == up.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_gradients_reach_both_branches():
    model, plan = mlp(dtype=torch.float64)
    batch = batch_of(dtype=torch.float64)
    loss, got = gradients(model, compiled(model), batch)
    (adapter,) = plan.adapters
    twin = copy.deepcopy(model)

    def factor(key):
        return getattr(twin.rana_fx, f"a0_{key}")

    def forward(x):
        y, exact = written_out(x, twin.up(x), adapter, factor)
        assert 0 < exact.double().mean() < 1
        return x + twin.down(F.gelu(y))

    expected_loss, expected = gradients(twin, forward, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert got.keys() == expected.keys()
    assert got.keys() >= {"up.weight", "up.bias", "rana_fx.a0_router", "rana_fx.a0_weight", "rana_fx.a0_bias"}
    for name, grad in got.items():
        assert relative(grad, expected[name]) < FP64, name


@pytest.mark.parametrize("name", FORMS)
def test_where_gradients_flow_the_linear_is_dense(name):
    model, _ = mlp(FORMS[name])
    _, nodes = graph_of(model, batch_of())
    assert masked_rows not in [node.target for node in nodes] and readers(nodes, "up_parameters_weight") == {F.linear}
    model.requires_grad_(False)
    _, nodes = graph_of(model, batch_of())
    assert [node.target for node in nodes].count(masked_rows) == 1


def test_lora_on_the_weight_reaches_exact_outputs_alone():
    model, _ = mlp()
    batch = batch_of()
    add_lora(model, lora_config(rank=4, dropout=0.0))
    assert {addition.name for addition in attached(model).factors.lowrank.additions()} >= {"up", "rana_fx.a0_weight"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    loss, found = gradients(model, compiled(model), batch)
    assert all("lora_" in name for name in found)
    with torch.no_grad():
        got, nodes = graph_of(model, batch)
        assert [node.target for node in nodes].count(masked_rows) == 1
        assert float(got.square().mean()) == pytest.approx(loss, rel=1e-5)


def test_a_deep_copy_and_casts_keep_thresholds():
    model, plan = mlp()
    twin = copy.deepcopy(model).bfloat16()
    for one in (model, twin):
        assert one.rana_fx.a0_exact_tau.dtype == torch.float32
        assert torch.equal(one.rana_fx.a0_exact_tau, plan.adapters[0].exact_tau)
        assert "a0_exact_tau" in dict(one.rana_fx.named_buffers())
    with torch.no_grad():
        assert relative(compiled(twin)(**batch_of(dtype=torch.bfloat16)), compiled(model)(**batch_of())) < 0.1


def test_weights_stored_by_inputs_are_laid_so_that_a_row_is_one_piece():
    model, _ = mlp(FORMS["stored_by_inputs"])
    before = model.up.weight.detach().clone()
    assert model.up.weight.shape == (WIDTH, FFN) and model.up.weight.stride() == (1, WIDTH)
    rana_fx.detach(model)
    assert model.up.weight.is_contiguous() and torch.equal(model.up.weight, before)
    for name in set(FORMS) - {"stored_by_inputs"}:
        assert mlp(FORMS[name])[0].up.weight.is_contiguous()
