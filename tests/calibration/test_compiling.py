"""Where PyTorch's switches turn compilation off, that is what is said; stances that merely put it off do not matter here."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rana_fx
from rana_fx.errors import CompilationDisabled
from rana_fx.evaluation.measure import measuring


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def batches():
    return [torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@contextlib.contextmanager
def by_variable():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield


@pytest.mark.parametrize(
    ("switched", "said"),
    [
        (by_variable, r"the environment variable TORCHDYNAMO_DISABLE is 1\..*Unset it and start Python again\."),
        (
            lambda: torch._dynamo.config.patch(disable=True),
            r"torch\._dynamo\.config\.disable is True\..*Set torch\._dynamo\.config\.disable = False\.",
        ),
        (
            lambda: torch.compiler.set_stance("force_eager"),
            r'set_stance\("force_eager"\) is in effect\..*Call torch\.compiler\.set_stance\("default"\)',
        ),
    ],
)
def test_the_switch_is_named(switched, said):
    model, adapted = Mlp(), Mlp()
    rana_fx.adapt(adapted, batches(), budget=0.6, recipe="teal", progress=False)
    with switched():
        with pytest.raises(CompilationDisabled, match=said):
            rana_fx.adapt(model, batches(), budget=0.6, recipe="teal", progress=False)
        with pytest.raises(CompilationDisabled, match=said):
            rana_fx.explain(adapted, batches()[0])
        with pytest.raises(CompilationDisabled, match=said), measuring(adapted):
            pass


def test_a_context_in_which_nothing_compiles_is_told_from_a_model_without_linears():
    class Quiet(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
            return func(*args, **(kwargs or {}))

    with Quiet(), pytest.raises(CompilationDisabled, match=r"TorchDispatchMode.*Leave the context"):
        rana_fx.explain(Mlp(), batches()[0])


@pytest.mark.parametrize("stance", ["eager_then_compile", "eager_on_recompile", "fail_on_recompile"])
def test_other_stances_do_not_hide_the_first_batch(stance):
    with torch.compiler.set_stance(stance):
        plan = rana_fx.adapt(Mlp(), batches(), budget=0.6, recipe="teal", progress=False)
        assert torch._dynamo.eval_frame._stance.stance == stance
    assert {site.name for site in plan.sites} == {"up", "down"} and plan.tokens == 72


def test_the_default_device_is_the_models_affair():
    """Here "meta" stands for any device but the CPU: nothing of ours may be created on it."""
    plain = [rana_fx.adapt(made(), batches(), budget=0.6, recipe=recipe, progress=False) for recipe in ("paper", "rana")]
    models, given = [made(), made()], batches()
    torch.set_default_device("meta")
    try:
        plans = [
            rana_fx.adapt(model, given, budget=0.6, recipe=r, progress=False)
            for model, r in zip(models, ("paper", "rana"), strict=True)
        ]
        assert rana_fx.explain(models[0], given[0]).sites == 2
    finally:
        torch.set_default_device(None)
    assert [plan.digest() for plan in plans] == [plan.digest() for plan in plain]


def made():
    torch.manual_seed(0)
    return Mlp()
