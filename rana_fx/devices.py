"""Names of devices: those that this machine computes on, and what a wrong name probably meant.

In: a name as ``torch.device`` takes it. Out: the device, or an error that lists the devices of this machine.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rana_fx.errors import InvalidOption, nearest

if TYPE_CHECKING:
    import torch

_MEANT = {"gpu": "cuda", "nvidia": "cuda", "h100": "cuda", "host": "cpu", "auto": ""}


def known_device(name: str | None) -> torch.device:
    """A device that tensors can be computed on; a GPU, if there is one, where it is None. Raises InvalidOption."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()  # tensors of meta have no values
    except Exception as error:  # a torch built without CUDA asserts, others have no such module
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        expected = "a device of this machine: " + ", ".join(available) + _hint(name, available, torch.version.cuda is not None)
        raise InvalidOption(name="device", got=name, expected=expected) from error
    return found


def _hint(name: str, available: list[str], with_cuda: bool) -> str:
    """What was probably meant, or why there is no GPU; "" where neither is known."""
    word = re.sub(r"^([a-z]+)[ _-]*(\d+)$", r"\1:\2", name.strip().lower())
    kind, _, index = word.partition(":")
    meant = _MEANT.get(kind, kind) + (f":{index}" if index else "")
    if meant.startswith("cuda") and len(available) == 1:
        why = "PyTorch finds no GPU" if with_cuda else "this PyTorch is built for the CPU alone"
        return f" ({why}; leave it out for the best device there is)"
    if not meant:
        return " (leave it out for the best device there is)"
    near = meant if meant in (*available, "cuda") else nearest(meant, available)
    return f" (did you mean {near}?)" if near and near != name else ""
