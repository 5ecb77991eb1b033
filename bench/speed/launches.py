"""What it costs that one kernel needs all results of another: a dependent launch against a barrier of all blocks of one launch.

    python -m bench.launches --out launches.jsonl

In: an NVIDIA GPU of compute capability 9.0. Out: a row for each number of blocks: microseconds between two steps, of which each
reads numbers that other blocks have written in the step before, as

    dependent    a launch for each step, which starts early and waits for the one before (as in a decoded token)
    barrier      one launch of all steps, with a barrier of all its blocks between them: an atomic counter in global memory

A router and the product behind it share one launch if the barrier is shorter: the product needs all ranks of the router.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.common.record import append, head
from bench.speed.timing import timed
from rana_fx.commands.record import show
from rana_fx.kernels.cuda import driver, nvrtc

THREADS, STEPS = 128, 200
BLOCKS = (32, 64, 128)
SOURCE = """
struct Arguments { float* numbers[2]; unsigned* arrived; int steps; };
__device__ __forceinline__ void step(const Arguments& a, int i) {
  unsigned count = gridDim.x * blockDim.x, at = blockIdx.x * blockDim.x + threadIdx.x;
  // written by other blocks, which no cache of this multiprocessor may hold
  const volatile float* from = a.numbers[i % 2];
  a.numbers[(i + 1) % 2][at] = from[(at * 97 + 41) % count] + 1.f;
}
extern "C" __global__ void dependent(const __grid_constant__ Arguments a) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  step(a, a.steps);
}
extern "C" __global__ void barrier(const __grid_constant__ Arguments a) {
  for (int i = 0; i < a.steps; i++) {
    step(a, i);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      atomicAdd(a.arrived, 1u);
      while (*(volatile unsigned*)a.arrived < (i + 1) * gridDim.x);
    }
    __syncthreads();
  }
}
"""


class Arguments(ctypes.Structure):
    """The struct of that name in ``SOURCE``."""

    _fields_ = (("numbers", ctypes.c_void_p * 2), ("arrived", ctypes.c_void_p), ("steps", ctypes.c_int))


def measure(blocks: int) -> dict[str, float]:
    """Microseconds of a step, by name.

    Raises:
        RuntimeError: steps have read numbers that were not yet written.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    numbers = [torch.zeros(blocks * THREADS, device=device) for _ in range(2)]
    arrived = torch.zeros(1, dtype=torch.int32, device=device)
    code = nvrtc.compiled(SOURCE, {}, "sm_90a")

    def launch(name: str, steps: int) -> None:
        pointers = (ctypes.c_void_p * 2)(*(one.data_ptr() for one in numbers))
        kernels[name](blocks, Arguments(pointers, arrived.data_ptr(), steps))

    def in_launches() -> None:
        numbers[0].zero_()
        for i in range(STEPS):
            launch("dependent", i % 2)

    def in_one() -> None:
        numbers[0].zero_()
        arrived.zero_()
        launch("barrier", STEPS)

    names = ("dependent", "barrier")
    kernels = {name: driver.load(code, name, threads=THREADS, shared_bytes=0, early=name == "dependent") for name in names}
    found = {}
    for name, run in (("dependent", in_launches), ("barrier", in_one)):
        found[name] = timed([run], device).p50 / STEPS
        if not bool((numbers[STEPS % 2] == STEPS).all()):
            raise RuntimeError(f"{name}: steps read numbers before they were written")
    return found


def run(out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")]) -> None:
    """Microseconds between dependent steps, in launches and in one launch."""
    out.unlink(missing_ok=True)
    rows = []
    for blocks in BLOCKS:
        found = measure(blocks)
        append(out, head("launches") | {"blocks": blocks, "threads_of_a_block": THREADS, "us": found})
        rows.append((str(blocks), *found.values()))
    show(f"{STEPS} steps, {torch.cuda.get_device_name()}", ("blocks", "dependent us", "barrier us"), rows)


if __name__ == "__main__":
    typer.run(run)
