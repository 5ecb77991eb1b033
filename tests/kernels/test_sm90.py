"""What Triton makes of the kernels for sm_90, found without a GPU: they compile, read weights 16 bytes at a time, and a launch
can be left in a graph for Inductor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

TRACE = """
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from rana_fx.kernels.triton.config import Config, Launch
from rana_fx.kernels.triton.masked_gemv import masked_gemv
from rana_fx.kernels.triton.router import router

def f(x, b, tau, w, counters):
    z, config = router(x, b, how=Launch(traced=True)), Config(4, 64)
    return masked_gemv(z, tau, w, config=config, counters=counters, how=Launch(traced=True))

shapes = ((1, 64), (32, 64), (32,), (32, 130))
graph = make_fx(f, tracing_mode="fake")(*map(torch.ones, shapes), torch.zeros(3, dtype=torch.int32)).graph
print([str(node.target) for node in graph.nodes if node.op == "call_function"])
"""


def run(*arguments):
    """stdout of a process that compiles where this one may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    lines = run(str(ROOT / "tests" / "support" / "compiled.py"), str(tmp_path_factory.mktemp("pasted"))).splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


def test_every_variant_reads_weights_by_sixteen_bytes(variants):
    assert len(variants) == 24
    assert [name for name, row in variants.items() if not row["wide_loads"]] == []


def test_a_traced_launch_stays_in_the_graph():
    targets = run("-c", TRACE)
    assert targets.count("triton_kernel_wrapper_mutation") == 2
