"""Adapted tiny models for training tests, each calibrated once per process, and helpers to run them without Inductor."""

from __future__ import annotations

import copy
import functools

import torch

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.training import Settings
from tests.support.architectures import build, ids, output

EPS = torch.finfo(torch.float32).eps
SETTINGS = Settings(rate=1e-2, warmup=0.1, accumulate=2)


@functools.cache
def _adapted(recipe, depth, budget, dtype, name):
    with torch.random.fork_rng():
        model, batch = build(name, depth)
        model = model.to(dtype)
        rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=budget, recipe=recipe, progress=False)
    return model, batch


def adapted(recipe="paper", depth=2, budget=0.7, dtype=torch.float32, name="plain_llama"):
    """(a model of its own with a plan attached, a batch)."""
    model, batch = _adapted(recipe, depth, budget, dtype, name)
    return copy.deepcopy(model), batch


def compiled(model, how=rewritten):
    torch._dynamo.reset()
    return torch.compile(model, backend=how)


def gradients(model, forward, batch):
    """(loss, gradient of each Parameter that has one)."""
    model.zero_grad()
    more = {"use_cache": False} if hasattr(model, "config") else {}
    loss = output(forward(**batch, **more)).square().mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), found


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def texts(count=8):
    """Batches of sequences with a learnable rule."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, 90, (2 * count, 1), generator=generator)
    rows = (start + 7 * torch.arange(12)) % 90 + 3
    return [
        {"input_ids": rows[i : i + 2], "attention_mask": torch.ones(2, 12, dtype=torch.int64)} for i in range(0, 2 * count, 2)
    ]
