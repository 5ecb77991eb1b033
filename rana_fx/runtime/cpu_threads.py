"""How many threads a decoded token should take on a CPU: one for each core that the process may run on.

In: Linux's list of the processors that share a core. Out: a number of threads. Products of a token read memory or fill a core's
vector units, so that a second thread on a core (a hyperthread) waits for the first; PyTorch counts it as a processor.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_PROCESSORS = Path("/sys/devices/system/cpu")
_SET_BY_HAND = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def cores(processors: Path = _PROCESSORS, allowed: set[int] | None = None) -> int | None:
    """Cores under ``allowed``, by default the processors that the process may run on; None where the system does not say."""
    if allowed is None:
        if not hasattr(os, "sched_getaffinity"):
            return None
        allowed = os.sched_getaffinity(0)
    try:
        found = {(processors / f"cpu{number}" / "topology" / "thread_siblings_list").read_text() for number in allowed}
    except OSError:
        return None
    return len(found)


def one_thread_per_core() -> None:
    """Give PyTorch as many threads as there are cores, unless the user chose a number in the environment; never more than it has.

    Code that is compiled afterwards uses them: a number changed later does not change it.
    """
    found = cores()
    if found and not any(os.environ.get(name) for name in _SET_BY_HAND) and found < torch.get_num_threads():
        torch.set_num_threads(found)
