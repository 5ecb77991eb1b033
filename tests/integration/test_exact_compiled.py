"""Exact outputs, compiled: with few tokens rows of the model's weight are read, and every mode equals the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.dense_memory import is_freed
from rana_fx.runtime.prefill import MODES
from tests.support.architectures import build, ids, output
from tests.support.exact import FFN, FORMS, Up, batch_of, by_hand, linear, mlp, plan_for, without, written_out
from tests.support.inductor import GEMV, ROUTER, ROWS, calls, compiled
from tests.support.trained import compiled as as_compiled
from tests.support.trained import gradients, relative

FP32 = 1e-5  # sums of about a hundred terms in two orders, in a few layers


# all pairs of: storage of the weight, number of tokens, dtype
PAIRS = [
    ("linear", 1, torch.float32),
    ("linear", 7, torch.bfloat16),
    ("stored_by_inputs", 1, torch.bfloat16),
    ("stored_by_inputs", 7, torch.float32),
]


def test_rows_are_read_and_two_runs_are_equal():
    """Of four models in one graph."""
    # one exact output for any number of tokens: few enough rows that reading them saves time
    tau = torch.where(torch.arange(40) == 3, -torch.inf, torch.inf)
    models, expected = [], []
    batches = [batch_of(tokens, dtype) for _, tokens, dtype in PAIRS]
    for (name, _, dtype), batch in zip(PAIRS, batches, strict=True):
        model, plan = mlp(FORMS[name], dtype=dtype, tau=tau)
        (adapter,) = plan.adapters
        plan = replace(plan, adapters=(replace(adapter, exact_kept=1.0, kept=6.0, tau=torch.zeros(6)),))
        rana_fx.attach(model, plan)
        models.append(model)
        expected.append(by_hand(model, plan, batch)[0])

    def everything(*xs):
        return [model(x) for model, x in zip(models, xs, strict=True)]

    with torch.no_grad():
        runs = [compiled(everything, *(batch["x"] for batch in batches), backend=rana_fx.backend) for _ in range(2)]
    (results, code), (again, _) = runs
    assert (calls(code, ROUTER), calls(code, GEMV), calls(code, ROWS)) == (4, 4, 4)
    # down is the only matrix product of a model
    assert code.count("extern_kernels.") == 4
    for got, other, right, (_, _, dtype) in zip(results, again, expected, PAIRS, strict=True):
        assert torch.equal(got, other)
        assert relative(got, right) < (FP32 if dtype == torch.float32 else 0.02)


class Alone(nn.Module):
    """The up projection and nothing else."""

    def __init__(self):
        super().__init__()
        self.up = Up(linear)

    def forward(self, x):
        return self.up(x)


def test_outputs_at_their_thresholds_are_one_or_the_other():
    """Compiled code may compare sums before or after rounding: the selected outputs must be those whose rows were read."""
    torch.manual_seed(0)
    model = Alone().bfloat16()
    batch = batch_of(1, torch.bfloat16)
    plan = plan_for(model, batch, ranks=2)
    (adapter,) = plan.adapters
    with torch.no_grad():
        dense = model(**batch)
        y, _ = written_out(batch["x"], dense, replace(adapter, exact_tau=torch.full((FFN,), torch.inf)))
        # half of the values were rounded upwards
        plan = replace(plan, adapters=(replace(adapter, exact_tau=y.float().flatten(), exact_kept=1.0),))
        rana_fx.attach(model, plan)
        got, code = compiled(model, batch["x"], backend=rana_fx.backend)
    assert calls(code, ROWS) == 1
    distance = torch.minimum((got - dense).abs(), (got - y).abs()).float()
    assert (distance <= 0.02 * (1 + got.float().abs())).all() and ((dense - y).abs() > 0.1).float().mean() > 0.5


def test_any_number_of_tokens():
    model, batch = build("plain_biased", 1)
    plan = plan_for(model, batch, ("up_proj",), ranks=8)
    rana_fx.attach(model, plan)
    forward = torch.compile(model, backend=rana_fx.backend, dynamic=True)
    for tokens in (12, 1, 5):
        given = ids(tokens)
        expected, _ = by_hand(model, plan, given)
        with torch.no_grad():
            assert relative(output(forward(**given)), expected) < FP32 < 1e-3 < relative(output(model(**given)), expected)


# modes affect only the rewrite; lowerings of rows are tested above
@pytest.mark.usefixtures("graphs_as_rewritten")
@pytest.mark.parametrize("prefill", MODES)
def test_prompts_and_single_tokens_in_every_mode(prefill):
    """Two texts of 12 tokens are a prompt. The other linear has factors only: mode "factors" frees its weight."""
    model, batch = build("plain_biased", 1)
    plan = plan_for(model, batch, ("up_proj", "down_proj"), ranks=8)
    exact, plain = plan.adapters[0], without(plan).adapters[1]
    plan = replace(plan, adapters=(exact, plain))
    rana_fx.attach(model, plan)
    prompt, single = ids(12), ids(1)
    everything = replace(plan, adapters=(exact, replace(plain, exact_tau=torch.full((plain.out,), torch.inf), exact_kept=0.0)))
    half = replace(everything, adapters=everything.adapters[1:])
    expected = {"masked": by_hand(model, everything, prompt)[0], "cheapest": by_hand(model, half, prompt)[0]}
    with torch.no_grad():
        expected |= {"dense": output(model(**prompt)), "factors": expected["masked"]}
    alone, _ = by_hand(model, everything, single)
    assert relative(expected["cheapest"], expected["masked"]) > 1e-3 < relative(expected["cheapest"], expected["dense"])
    forward = torch.compile(model, backend=rana_fx.backend, options={"prefill": prefill})
    with torch.no_grad():
        for given, right in ((prompt, expected[prefill]), (single, alone), (prompt, expected[prefill])):
            assert relative(output(forward(**given)), right) < FP32
    freed = {name.removesuffix(".weight") for name, parameter in model.named_parameters() if is_freed(parameter)}
    assert freed == ({plain.name} if prefill == "factors" else set())


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_plan_as_an_option():
    model, batch = build("gpt2", 1)
    plan = plan_for(model, batch, ("c_fc",), ranks=8)
    expected, _ = by_hand(model, plan, batch)
    with torch.no_grad():
        got = output(torch.compile(model, backend=rana_fx.backend, options={"plan": plan})(**batch))
    assert relative(got, expected) < FP32


@pytest.mark.slow
def test_gradients_through_inductor():
    model, _ = mlp()
    batch = batch_of()
    expected, got = (gradients(model, as_compiled(model, how), batch)[1] for how in (rewritten, "rana"))
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert relative(grad, expected[name]) < FP32, name
