"""A plan of recipe ``cats`` through the backend: decoding reads kept rows of up and down; prompts and training are dense."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import rana_fx
from rana_fx._backend import rewritten
from tests.support.adapted import adapted, relative
from tests.support.architectures import ids, output
from tests.support.by_hand import outputs_by_hand
from tests.support.inductor import GEMV, ROWS, calls


def one_row(tokens):
    return {key: value[:1] for key, value in ids(tokens).items()}


def masked(model, batch):
    return outputs_by_hand(model, batch)[0]


def compiled(model, batch, **settings):
    """(output, Inductor's code)."""
    torch.compiler.reset()
    with torch.no_grad():
        got, (code, *_) = run_and_get_code(torch.compile(model, backend=rana_fx.backend, **settings), **batch)
    return output(got), code


@pytest.mark.parametrize(("depth", "tokens"), [(1, 3), (2, 1)])
def test_decoding_reads_kept_rows(depth, tokens):
    model, _, _ = adapted(depth=depth, budget=0.75, recipe="cats")
    batch = one_row(tokens)
    expected = masked(model, batch)
    got, code = compiled(model, batch)
    assert (calls(code, ROWS), calls(code, GEMV)) == (depth, depth)
    assert relative(got, expected) < 1e-5
    with torch.no_grad():
        assert relative(output(model(**batch)), expected) > 1e-3


@pytest.mark.parametrize("mode", ["dense", "cheapest"])
def test_prompts_are_dense_products(mode):
    model, _, _ = adapted(budget=0.75, recipe="cats")
    prompt, token = ids(12), one_row(1)
    with torch.no_grad():
        dense = output(model(**prompt))
    expected = dense if mode == "dense" else masked(model, prompt)
    got, code = compiled(model, prompt, options={"prefill": mode})
    assert (calls(code, ROWS), calls(code, GEMV)) == (0, 0)
    assert relative(got, expected) < 1e-5
    got, code = compiled(model, token, options={"prefill": mode})
    assert (calls(code, ROWS), calls(code, GEMV)) == (1, 1)
    assert relative(got, masked(model, token)) < 1e-5


# through Inductor: test_gated_compiled.py
@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_varying_number_of_tokens():
    model, _, _ = adapted(budget=0.75, recipe="cats")
    batches = [ids(tokens) for tokens in (12, 5, 1)]
    expected = [masked(model, batch) for batch in batches]
    function = torch.compile(model, backend=rana_fx.backend, dynamic=True)
    with torch.no_grad():
        for batch, right in zip(batches, expected, strict=True):
            assert relative(output(function(**batch)), right) < 1e-5


@pytest.mark.slow
def test_gradients_are_those_of_the_graph_run_as_it_is():
    model, batch, _ = adapted(budget=0.75, recipe="cats")
    found = []
    for how in (rewritten, rana_fx.backend):
        torch.compiler.reset()
        model.zero_grad()
        output(torch.compile(model, backend=how)(**batch)).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    for name, grad in found[0].items():
        assert relative(found[1][name], grad) < 1e-4, name
