"""``rana-fx env``: what this machine has, and which kernels compute on it: what a report of a fault should include."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rana_fx.commands import options as o
from rana_fx.commands.record import facts_of, write_json
from rana_fx.commands.screen import Screen

if TYPE_CHECKING:
    import torch

_SIZE = 4096  # of the linear whose kernels are shown


@dataclass(frozen=True)
class Choice:
    """The implementation of a masked product of one token on a device. passed: those before it, each with the reason."""

    device: str
    bits: int
    chosen: str
    passed: dict[str, str]


def command(json: o.Json = None, quiet: o.Quiet = False) -> None:
    """Show versions, devices, the compiler, and the kernels that decoding uses on this machine."""
    facts = facts_of("env") | {"machine": machine(), "kernels": [asdict(choice) for choice in choices()]}
    screen = Screen(quiet)
    screen.facts("versions and machine", [*facts["versions"].items(), *facts["machine"].items()])
    kernels = [(f"{one['device']}, weights in {one['bits']} bits", _kernel(one)) for one in facts["kernels"]]
    screen.facts("kernel of the masked product of one token, compiled", kernels)
    screen.next_steps(("rana-fx demo", "a model that ships with it, in a few minutes"))
    write_json(json, facts)


def _kernel(choice: dict[str, Any]) -> str:
    """The chosen one, and why not those before it."""
    passed = [f"{name}: {reason}" for name, reason in choice["passed"].items()]
    return f"{choice['chosen']} (not {'; '.join(passed)})" if passed else str(choice["chosen"])


def machine() -> dict[str, str]:
    """Facts of the machine as text: processor, threads, instruction set, compiler, GPUs."""
    import torch
    from torch._inductor import cpu_vec_isa
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except Exception as error:  # Inductor raises a class of its own where none is found
        compiler = f"none ({error})"
    found = {
        "platform": platform.platform(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "vector instructions": str(cpu_vec_isa.pick_vec_isa()),
        "C++ compiler": compiler,
    }
    if not torch.cuda.is_available():
        return found | {"GPU": "none that PyTorch can use"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        found[f"GPU {index}"] = f"{properties.name}, {properties.major}.{properties.minor}, {memory}"
    return found | {"CUDA": str(torch.version.cuda)}


def choices() -> list[Choice]:
    """The kernels of masked products on each kind of device, for weights in 16, 8 and 4 bits."""
    import torch

    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    return [_choice(device, bits) for device in devices for bits in (16, 8, 4)]


def _choice(device: torch.device, bits: int) -> Choice:
    import torch
    from torch._inductor import config

    from rana_fx.kernels.problem import Problem
    from rana_fx.kernels.registry import choose, why

    stored = {16: torch.bfloat16, 8: torch.int8, 4: torch.uint8}[bits]
    problem = Problem("masked_gemv", device, torch.bfloat16, 1, 1, _SIZE, _SIZE, stored, bits)
    with config.patch({"triton.cudagraphs": device.type == "cuda"}):
        passed = {row.name: reason for row, reason in why(problem) if row.device in (None, device.type)}
        return Choice(device.type, bits, choose(problem).name, passed)
