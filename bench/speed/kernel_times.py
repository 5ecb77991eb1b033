"""Profile of a decode step: microseconds per kernel, summed by name (``bench.decode --profile``).

In: a function that decodes some steps. Out: one entry per kernel name (operator name on a CPU), largest first, and a table with
the sum of kernel times against the time of the step. The kernels of a replayed CUDA graph are recorded individually. The profiler
slows the host, so the time of a step is measured without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rana_fx.commands.record import show

_SHOWN = 30


def kernel_times(decode: Callable[[], object], *, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """``[{"kernel", "calls", "us", "share"}]``, means per step; ``decode`` runs ``steps`` steps. share: of all kernel time."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # without acc_events torch 2.11 warns at a second profile that the events of the first are discarded
    with profile(activities=activities, acc_events=True) as profiler:
        decode()
    found = []
    for event in profiler.key_averages():
        # annotations contain kernels that have their own entries
        if on_gpu and (event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False)):
            continue
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if us > 0:
            found.append({"kernel": event.key, "calls": event.count / steps, "us": us / steps})
    total = sum(item["us"] for item in found)
    found.sort(key=lambda item: -item["us"])
    return [item | {"share": item["us"] / total} for item in found]


def show_kernels(title: str, found: list[dict[str, Any]], step_ms: float) -> None:
    """Print the largest entries, and the sum of kernel times against the time of the step."""
    lines = [(item["kernel"][:110], item["calls"], item["us"], item["share"]) for item in found[:_SHOWN]]
    busy = sum(item["us"] for item in found) / 1000
    note = f"{len(found)} names, {sum(item['calls'] for item in found):.0f} launches, {busy:.3f} ms of a step of {step_ms:.3f} ms"
    show(f"{title}: kernels of one step", ("kernel", "calls", "us", "share"), lines, notes=[note])
