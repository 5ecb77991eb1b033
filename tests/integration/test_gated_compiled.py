"""Gated adapters with a threshold per neuron, compiled: equal to the reference for any number of tokens and in every mode."""

from __future__ import annotations

import pytest
import torch

import rana_fx
from rana_fx.evaluation.measure import measuring
from rana_fx.runtime.prefill import MODES
from tests.support.architectures import FFN, ids, output
from tests.support.gates import by_hand, per_neuron
from tests.support.trained import relative

FP32 = 1e-5  # sums of about a hundred terms in two orders, in a few layers


# a varying number of tokens through Inductor: test_backend.py, and test_exact_compiled.py
@pytest.mark.usefixtures("graphs_as_rewritten")
def test_any_number_of_tokens_is_what_every_mlp_gives_by_hand():
    model, _, plan = per_neuron(depth=1)
    compiled = torch.compile(model, backend=rana_fx.backend, dynamic=True)
    batches = [ids(tokens) for tokens in (12, 1, 5)]
    by_hands = [by_hand(model, plan, batch) for batch in batches]
    for batch, (expected, _) in zip(batches, by_hands, strict=True):
        with torch.no_grad():
            assert relative(output(compiled(**batch)), expected) < FP32 < 1e-3 < relative(output(model(**batch)), expected)
    rows = [batch["input_ids"].numel() for batch in batches]
    with measuring(model) as meter:
        for batch, (expected, _) in zip(batches, by_hands, strict=True):
            assert relative(output(meter.run(batch)), expected) < FP32
    (name,) = (adapter.name for adapter in plan.adapters)
    kept = sum(count * kept[name] for count, (_, kept) in zip(rows, by_hands, strict=True)) / sum(rows)
    assert meter.result().density == pytest.approx({name: kept / FFN}, rel=1e-6)


# modes affect only the rewrite; through Inductor: above, and test_cats_compiled.py
@pytest.mark.usefixtures("graphs_as_rewritten")
@pytest.mark.parametrize("prefill", MODES)
def test_prompts_and_single_tokens_in_every_mode(prefill):
    """Two texts of 12 tokens are a prompt, of 1 token are not: mode "dense" leaves the MLP dense in a prompt."""
    model, _, plan = per_neuron(depth=1)
    compiled = torch.compile(model, backend=rana_fx.backend, options={"prefill": prefill})
    for tokens in (12, 1, 12):
        given = ids(tokens)
        expected, _ = by_hand(model, plan, given)
        with torch.no_grad():
            dense = output(model(**given))
            got = output(compiled(**given))
        asked, other = (dense, expected) if prefill == "dense" and tokens == 12 else (expected, dense)
        assert relative(got, asked) < FP32 and relative(got, other) > 1e-3


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_graph_without_the_plan_attached_takes_it_as_an_option():
    model, batch, plan = per_neuron(depth=1)
    expected, _ = by_hand(model, plan, batch)
    rana_fx.detach(model)
    with torch.no_grad():
        got = output(torch.compile(model, backend=rana_fx.backend, options={"plan": plan})(**batch))
    assert relative(got, expected) < FP32
