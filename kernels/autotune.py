"""Which of a few configs is the fastest for a bucket of shapes: measured once, kept across processes.

In: a key that names the bucket, the configs and a function that times one. Out: the fastest. What was measured is
kept in a JSON file beside Inductor's own caches, one per device, torch, Triton and version of these kernels; it is replaced in
one step, so a process that is killed loses its own measurements and nothing else. Shapes are in one bucket where their sizes lie
in the same quarter of an octave and their densities in the same tenth: layers of one model differ by a few ranks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from rana_fx.atomic import write_bytes

C = TypeVar("C")
_ROTATED_BYTES = 200e6  # an H200 has 50 MiB of L2
_MOST_ROTATED = 256
_REPLAYS = 15
_MARGIN = 0.05


def bucket(K: int, N: int, T: int, density: float, bits: int, dtype: torch.dtype) -> str:
    """The name of a bucket of masked GEMVs (density 1 for a router)."""
    sizes = "x".join(str(round(4 * math.log2(max(size, 1)))) for size in (K, N))
    return f"{sizes} T{T} d{round(10 * density)} b{bits} {str(dtype).removeprefix('torch.')}"


def fastest(key: str, choices: Sequence[C], measure: Callable[[C], float], *, file: Path | None = None) -> C:
    """The choice with the least time; measured once per key and file.

    Args:
        choices: the first is taken where nothing can be measured, and where no other is faster by a twentieth: smaller
            differences turn around in a model, where other launches surround it. A choice that raises (too much shared memory,
            say) is left out.
        measure: microseconds of one choice.
        file: where to remember it; default: beside Inductor's caches, by device and versions.
    """
    path, name = file or _file(), f"{key} of {len(choices)}"
    known = _read(path).get(name)
    if isinstance(known, int) and 0 <= known < len(choices):
        return choices[known]
    times = []
    for index, choice in enumerate(choices):
        with contextlib.suppress(Exception):  # whatever a compiler or a driver raises: the others are left
            times.append((measure(choice), index))
    if not times:
        return choices[0]
    best = min(times)[1]
    if times[0][1] == 0 and min(times)[0] > (1 - _MARGIN) * times[0][0]:
        best = 0
    _write(path, _read(path) | {name: best})
    return choices[best]


def copies_of(bytes_each: float) -> int:
    """How many weights to rotate over, so that a launch does not find in L2 what another one left there.

    At most some hundreds: matrices so small that these fit into L2 are those of a model that fits as well.
    """
    return min(max(2, -int(-_ROTATED_BYTES // max(bytes_each, 1))), _MOST_ROTATED)


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time per call on the current CUDA device of CUDA-graph replays of all of them, as a model decodes: weights are not
    in L2, and each starts while the one before it ends. In a model other launches lie between: there a config that was a little
    faster here may be slower (Llama-2-7B at half the bytes, H200: 3.53 ms a step with those chosen so, without any choice 3.24).

    Raises: whatever a launch raises.
    """
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    took = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end))
    return 1e3 * float(statistics.median(took)) / len(calls)


def sources_in(folder: Path) -> list[Path]:
    """All files of code in a folder and those below it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cu", ".cuh"))


@functools.cache
def _file() -> Path:
    import triton
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    sources = [path.read_bytes() for path in sources_in(Path(__file__).resolve().parent)]
    facts = [torch.__version__, triton.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "none"]
    digest = hashlib.sha256(b"".join([*sources, *(fact.encode() for fact in facts)])).hexdigest()[:16]
    return Path(cache_dir()) / "rana_fx" / f"tuned-{digest}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or not ours: measure again
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, json.dumps(content, indent=1, sort_keys=True).encode())
