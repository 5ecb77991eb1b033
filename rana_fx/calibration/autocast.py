"""Autocast that a caller of ``adapt`` has on: the model runs under it, and recipes compute without it.

In: the state of autocast in this thread. Out: contexts that switch it off, or on as it was. Statistics and decompositions are of
the dtypes that they ask for; a matmul that autocast makes half precision would change them, or break where bits are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

State = tuple[tuple[str, torch.dtype], ...]
_DEVICES = ("cpu", "cuda", "xpu")


def autocast_now() -> State:
    """Device types for which autocast is on, with its dtypes."""
    return tuple((device, torch.get_autocast_dtype(device)) for device in _DEVICES if torch.is_autocast_enabled(device))


@contextmanager
def autocast_as(state: State) -> Iterator[None]:
    """Autocast as it was, also off."""
    with ExitStack() as stack:
        for device, _ in autocast_now():
            stack.enter_context(torch.autocast(device, enabled=False))
        for device, dtype in state:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield
