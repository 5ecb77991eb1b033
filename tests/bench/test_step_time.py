"""Expected times of adapters and of a decoded token: sums over launches, what is fused, and which linears are left dense."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.speed.random_plan import layout_of, plan_configs, random_plan
from rana_fx.kernels import cost
from rana_fx.kernels.cuda import implementations as tensor_core_rows
from rana_fx.kernels.cuda import router_implementations as router_rows
from rana_fx.kernels.triton import implementations as triton_rows
from rana_fx.runtime import prefill
from rana_fx.runtime.adapter_time import adapter_us, dense_us, linear_us, tokens_faster
from rana_fx.step_time import StepTime, expected, step_time
from tests.support.plain_llama import PlainLlama, Sizes

GPU = torch.device("cuda")
DEPTH = 2
H200 = cost.H200


@pytest.fixture(scope="module", autouse=True)
def h200():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "nearest", lambda device: H200)
        patch.setattr(triton_rows, "_installed", lambda: True)
        patch.setattr(tensor_core_rows, "_device", lambda device: None)
        patch.setattr(router_rows, "_device", lambda device: None)
        yield


def model_of(width, inner):
    torch.manual_seed(0)
    return PlainLlama(DEPTH, Sizes(vocab=64, width=width, inner=inner, shared=4)).to(torch.bfloat16).requires_grad_(False)


@pytest.fixture(scope="module")
def large():
    model = model_of(1024, 4096)
    return model, layout_of(model)


def plan_of(model, layout, menu, budget):
    return random_plan(model, layout, budget, config=plan_configs(menu, density=0.5, stacked=True)[0])


def records(plan):
    return {site.name: site for site in plan.sites}


def test_a_dense_step_is_every_linear_and_what_is_between(large):
    _, layout = large
    step = step_time(layout, None, GPU)
    linears = sum(cost.dense_us(site.in_features, site.out_features, H200) for site in layout.sites.values())
    # two norms in front of linears in each layer, and the last one in front of the head; gate * up in a launch of its own
    rest = H200.step_us + DEPTH * (H200.attention_us + 2 * H200.norm_us + H200.pointwise_us) + H200.norm_us
    assert step.dense_rest == step.rest == pytest.approx(rest)
    assert step.ms == step.dense_ms == pytest.approx((linears + rest) / 1000)
    assert step.slower == () and step.replaced == {}


def test_launches_compute_norms_and_stacked_gates_their_product(large):
    model, layout = large
    step = step_time(layout, plan_of(model, layout, "rank", 0.5), GPU)
    assert step.dense_rest - step.rest == pytest.approx(DEPTH * (2 * H200.norm_us + H200.pointwise_us))
    masked = step_time(layout, plan_of(model, layout, "neuron:16/4", 0.2), GPU)
    assert masked.dense_rest - masked.rest == pytest.approx(DEPTH * (2 * H200.norm_us + H200.pointwise_us))
    apart = step_time(layout, plan_of(model, layout, "apart", 0.5), GPU)
    assert apart.dense_rest == apart.rest


def test_an_adapter_is_the_sum_of_its_launches(large):
    model, layout = large
    plan = plan_of(model, layout, "rank:8/4", 0.2)
    adapter = next(one for one in plan.adapters if one.router is not None)
    outputs = adapter.weight_scale.shape[1] * 64
    weight = cost.tensor_core_us(adapter.ranks, outputs, 1, adapter.density, H200, bits=4)
    whole = adapter_us(adapter, records(plan), GPU)
    router = whole - weight
    assert 0 < router < cost.dense_us(adapter.ranks, 1024, H200, bits=16) + H200.launch_us
    twice = {name: dataclasses.replace(site, uses=2) for name, site in records(plan).items()}
    assert adapter_us(adapter, twice, GPU) == pytest.approx(2 * whole)
    assert dense_us(adapter, records(plan), GPU) == pytest.approx(
        sum(cost.dense_us(1024, records(plan)[name].out_features, H200) for name in adapter.sites)
    )


def test_nothing_is_expected_where_nothing_was_measured(large):
    model, layout = large
    plan = plan_of(model, layout, "rank", 0.5)
    cpu = torch.device("cpu")
    assert step_time(layout, plan, cpu) is None
    assert adapter_us(plan.adapters[0], records(plan), cpu) is None
    assert linear_us(plan.sites[0], cpu) is None
    assert tokens_faster(plan.adapters[0], records(plan), cpu, 8) == 8


@pytest.mark.parametrize(("menu", "budget"), [("rank", 0.5), ("rank:8/4", 0.2)])
def test_small_linears_are_left_dense_where_their_adapter_takes_longer(menu, budget):
    """Two launches of a rank adapter of a small layer take longer than its one, though each skips rows."""
    model = model_of(128, 256)
    layout = layout_of(model)
    plan = plan_of(model, layout, menu, budget)
    step = step_time(layout, plan, GPU)
    assert step.slower
    ranked = [one for one in plan.adapters if one.router is not None and len(one.sites) == 1] or plan.adapters
    for adapter in ranked:
        us, dense = adapter_us(adapter, records(plan), GPU), dense_us(adapter, records(plan), GPU)
        assert (adapter.name in step.slower) == (us >= dense)
        found = tokens_faster(adapter, records(plan), GPU, 16)
        assert (found == 0) == (us >= dense)
        assert prefill.tokens_masked(plan, adapter, model.lm_head.weight) >= prefill.tokens_adapted(
            plan, adapter, model.lm_head.weight
        )


def test_the_sentence_names_the_first_slower_adapters():
    step = StepTime({f"l{i}": 2.0 for i in range(5)} | {"head": 10.0}, {f"l{i}": 1.0 for i in range(5)}, 5.0, 6.0)
    assert step.ms == pytest.approx(0.025) and step.dense_ms == pytest.approx(0.021)
    assert expected(dataclasses.replace(step, rest=1000.0, dense_rest=2000.0)) == (
        "a decoded token is expected to take 1.02 ms, dense 2.02 ms; the linears of l0, l1, l2 and 2 more are faster dense, as "
        "prefill=dense leaves them"
    )
    dense = dataclasses.replace(step, replaced={})
    assert expected(dense) == f"a decoded token is expected to take {dense.ms:.2f} ms"
