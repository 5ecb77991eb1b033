"""Tiny models with plans, each calibrated once per process, and their layouts."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator

import pytest
import torch

import rana_fx
from rana_fx import adaptation
from rana_fx.calibration.layout import Layout
from rana_fx.runtime.attachment import attached
from tests.support.architectures import ARCHITECTURES, make
from tests.support.further_architectures import FURTHER

EVERY = ARCHITECTURES | FURTHER


@contextlib.contextmanager
def layouts() -> Iterator[list[Layout]]:
    """Records the layouts of all models adapted inside the context; tracing a model again takes seconds."""
    seen: list[Layout] = []
    calibrate = adaptation.calibrate

    def calibrated(*args, **kwargs):
        found = calibrate(*args, **kwargs)
        seen.append(found.layout)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptation, "calibrate", calibrated)
        yield seen


@functools.cache
def _adapted(name, depth, budget, recipe):
    with torch.random.fork_rng():
        model, batch = make(EVERY[name], depth)
        batches = [batch, *(EVERY[name].inputs() for _ in range(4))]
        rana_fx.adapt(model, batches, budget=budget, recipe=recipe, progress=False)
    return model, batch


def adapted(name="plain_llama", depth=1, budget=0.7, recipe="paper"):
    """(a model of its own with a plan attached, a batch, the plan)."""
    model, batch = _adapted(name, depth, budget, recipe)
    model = copy.deepcopy(model)
    return model, batch, attached(model).plan


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())
