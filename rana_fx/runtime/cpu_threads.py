"""How many threads a decoded token should take on a CPU: one for each core that the process may run on.

In: Linux's list of the processors that share a core, and the CPU time that a container may use. Out: a number of threads.
Products of a token read memory or fill a core's vector units, so that a second thread on a core (a hyperthread) waits for the
first; PyTorch counts it as a processor. Threads above the quota of a container are stopped while others wait for them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_PROCESSORS = Path("/sys/devices/system/cpu")
_CONTROL_GROUP = Path("/sys/fs/cgroup")
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


def quota(group: Path = _CONTROL_GROUP) -> int | None:
    """Whole CPUs of time that a control group of version 2 or 1 may use, at least one; None for any number."""
    try:
        allowed, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            allowed, period = ((group / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        share = float(allowed) / float(period)  # no limit is "max", or -1 in version 1
    except (ValueError, ZeroDivisionError):
        return None
    return max(1, int(share)) if share > 0 else None


def one_thread_per_core() -> None:
    """Give PyTorch as many threads as there are cores, within the quota, unless the user chose a number in the environment; never
    more than it has.

    The number is part of the code. Dynamo guards on it, so that the next call after a change compiles again.
    """
    if any(os.environ.get(name) for name in _SET_BY_HAND):
        return
    found = min(number for number in (cores(), quota(), torch.get_num_threads()) if number)
    if found < torch.get_num_threads():
        torch.set_num_threads(found)
