"""Check that training can resume from the state of a checkpoint, before any state of the training is changed.

In: a state as ``checkpoint.read`` returns it, the trained Parameters, their optimizer and the number of steps. Out: nothing, or
CheckpointError. A checksum detects most faults; files of earlier versions, without a checksum, have only these checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rana_fx.errors import CheckpointError

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_HISTORY = {"tokens", "losses", "evaluations", "seconds", "step_seconds"}


def check(
    path: Path, state: Mapping[str, Any], trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
) -> None:
    """Check parameters, optimizer state, random state and history. Raises CheckpointError."""
    try:
        _check_parameters(state["parameters"], trained)
        _check_optimizer(state["optimizer"], list(trained.items()), optimizer.state_dict()["param_groups"])
        _check_random(state["rng"])
        _check_history(state["done"], steps)
    except _WrongError as error:
        raise CheckpointError(path=path, reason=str(error), todo="start without resuming") from None


class _WrongError(Exception):
    pass


def _expect(right: bool, reason: str) -> None:
    if not right:
        raise _WrongError(reason)


def _check_parameters(found: Any, trained: Mapping[str, nn.Parameter]) -> None:
    _expect(isinstance(found, dict), f"its parameters are a {type(found).__name__}")
    odd = sorted(map(str, found.keys() ^ trained.keys()))
    _expect(not odd, f"it lacks Parameters, or has others: {', '.join(odd[:4])}")
    for name, parameter in trained.items():
        _check_tensor(name, found[name], parameter)


def _check_tensor(name: str, found: Any, like: Tensor) -> None:
    expected = f"{tuple(like.shape)} {like.dtype}"
    got = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
    _expect(got == expected, f"{name} is {got}, expected {expected}")
    _expect(bool(found.isfinite().all()), f"{name} has values that are not finite")


def _check_optimizer(found: Any, trained: list[tuple[str, nn.Parameter]], groups: list[dict[str, Any]]) -> None:
    _expect(isinstance(found, dict) and found.keys() == {"state", "param_groups"}, "the state of its optimizer is none")
    got = found["param_groups"]
    alike = isinstance(got, list) and len(got) == len(groups) and all(isinstance(group, dict) for group in got)
    alike = alike and all(
        mine["params"] == group.get("params") and _same_options(mine, group) for mine, group in zip(groups, got, strict=True)
    )
    _expect(alike, "its optimizer has other Parameters or options")
    states = found["state"]
    _expect(isinstance(states, dict) and set(states) <= set(range(len(trained))), "its optimizer has other Parameters")
    for index, moments in states.items():  # a Parameter that never had a gradient has no state
        name, parameter = trained[index]
        _expect(isinstance(moments, dict) and moments.keys() == _MOMENTS, f"the optimizer's state of {name} is none")
        for key in ("exp_avg", "exp_avg_sq"):
            _check_tensor(f"{key} of {name}", moments[key], parameter)
        step = moments["step"]
        counted = isinstance(step, Tensor) and step.numel() == 1 and math.isfinite(float(step)) and float(step) >= 0
        _expect(counted, f"the optimizer's steps of {name} are no number")


def _same_options(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two groups agree in their common options, except the rate, which is set before each step; torch adds options."""
    if not {"lr", "betas", "eps", "weight_decay"} <= other.keys() or not isinstance(other["lr"], int | float):
        return False
    both = mine.keys() & other.keys() - {"lr", "params"}
    return all(not isinstance(other[key], Tensor) and mine[key] == other[key] for key in both)


def _check_random(found: Any) -> None:
    states = isinstance(found, list) and bool(found) and all(isinstance(one, Tensor) for one in found)
    _expect(states and all(one.dtype == torch.uint8 and one.dim() == 1 for one in found), "its random state is none")
    _expect(len(found[0]) == len(torch.get_rng_state()), "its random state is of another length")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    _expect(len(found) - 1 <= devices, f"it was made with {len(found) - 1} GPUs, here are {devices}")


def _check_history(found: Any, steps: int) -> None:
    _expect(isinstance(found, dict) and found.keys() == _HISTORY, "its history is none")
    losses, seconds = found["losses"], found["step_seconds"]
    _expect(_numbers(losses) and 1 <= len(losses) <= steps, "its losses are not those of steps of this training")
    _expect(_numbers(seconds) and len(seconds) == len(losses), "its steps and their seconds are not as many")
    _expect(isinstance(found["tokens"], int) and found["tokens"] > 0 and _numbers([found["seconds"]]), "its counts are none")
    pairs = found["evaluations"]
    right = isinstance(pairs, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    right = right and all(isinstance(step, int) and 0 <= step <= steps and _numbers([loss]) for step, loss in pairs)
    _expect(right, "its evaluations are none")


def _numbers(found: Any) -> bool:
    """Whether a value is a list of finite numbers."""
    return isinstance(found, list) and all(isinstance(one, int | float) and math.isfinite(one) for one in found)
