"""Weights in whose place factors are read are no inputs of the compiled code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.graph.unused_inputs import remove_unused_weights, taking
from rana_fx.passes.runner import run


class Two(nn.Module):
    """Square linears: the factors of "static" have a rank below half, so that both are replaced."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(24, 24, bias=bias) for bias in (True, False, False))

    def forward(self, x):
        return self.head(x + self.second(torch.relu(self.first(x))))


@pytest.fixture(scope="module")
def planned():
    torch.manual_seed(0)
    model = Two().requires_grad_(False)
    rana_fx.adapt(model, [torch.randn(300, 24)], budget=0.6, recipe="static", progress=False)
    return model


def test_compiled_code_takes_only_what_it_reads(planned, monkeypatch):
    import torch._inductor.compile_fx as inductor

    given = []
    real = inductor.compile_fx

    def counting(gm, inputs, **rest):
        inner = real(gm, inputs, **rest)

        def called(*args):
            given.append((len(inputs), len(args)))
            return inner(*args)

        return called

    monkeypatch.setattr(inductor, "compile_fx", counting)
    x = torch.randn(3, 24)
    with torch.no_grad():
        got = torch.compile(planned, backend=rana_fx.backend)(x)
        expected = run_rewritten(planned, x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # x and the head: neither the two weights that were replaced, nor the bias, which is in a factor
    assert set(given) == {(2, 2)}


def run_rewritten(model, x):
    torch.compiler.reset()
    return torch.compile(model, backend=rana_fx._backend.rewritten)(x)


def test_a_caller_may_pass_all_inputs(planned):
    """As one does that split the graph before the backend saw its parts."""
    seen = []

    def backend(gm, inputs):
        run(gm, inputs)
        stay = remove_unused_weights(gm, inputs)
        seen.append((stay, len(inputs)))
        function = taking(gm.forward, stay, len(inputs))
        torch.testing.assert_close(function(*inputs), function(*(inputs[i] for i in stay)), rtol=0, atol=0)
        return function

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(planned, backend=backend)(torch.randn(3, 24))
    ((stay, count),) = seen
    assert (len(stay), count) == (2, 5)
    assert taking(len, [0, 1], 2) is len
