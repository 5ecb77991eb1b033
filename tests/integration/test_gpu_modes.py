"""Every kind of adapter in every storage, in every mode of torch.compile, from the first call of a process on.

CUDA graphs put up with no tensor that is made while a graph is warmed up or captured and outlives the call; what a process makes
once (counters, tables) would be such a one in its first call, and only there. So each mode and storage is a process of its own
(tests/support/every_kind.py), once with empty compiler caches and once more with those of the first, where nothing is lowered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rana_fx._backend import rewritten
from rana_fx.kernels import ops
from tests.support.every_kind import TOKENS, made

ROOT = Path(__file__).resolve().parents[2]
MODES = ("default", "reduce-overhead", "max-autotune")
AT_ONCE = 6  # processes on the GPU


def run(folder, *arguments):
    """What a process reports. Raises where it fails."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.every_kind", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment | caches, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def runs(folder, mode, bits, way):
    """Of a process with empty caches and, where the cost model chooses, of another one that finds them filled."""
    folder.mkdir()
    return [run(folder, "cuda", mode, str(bits), way) for _ in range(2 if way == "chosen" else 1)]


@pytest.fixture(scope="module")
def started(request, tmp_path_factory):
    """The processes of all tests that were selected, some at a time."""
    base = tmp_path_factory.mktemp("modes")
    asked = [item.callspec.params for item in request.session.items if getattr(item, "originalname", "") == "test_first_calls"]
    keys = [(params["mode"], params["bits"], params["way"]) for params in asked]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {key: pool.submit(runs, base / "-".join(map(str, key)), *key) for key in keys}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("way", ["chosen", "kernels"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("mode", MODES)
def test_first_calls(started, mode, bits, way):
    for found in started[mode, bits, way].result():
        assert len(found["errors"]) == 2 * len(TOKENS) * 3
        # fp32 sums in another order, over as many blocks
        assert max(found["errors"]) < 1e-4
        assert found["skips"] == 0
        if way == "kernels":
            assert not [line for line in found["chosen"] if line.startswith("masked_gemv by reference")]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_kind_is_there(bits):
    """What the processes compile holds every operation, of matrices in the storage that was asked for."""
    import rana_fx

    model, plan = made(bits)
    rana_fx.attach(model, plan)
    seen = []

    def recording(gm, example_inputs):
        function = rewritten(gm, example_inputs)
        seen.extend(node for node in gm.graph.nodes if node.op == "call_function")
        return function

    with torch.no_grad():
        x = torch.randn(2, 256)
        assert not torch.allclose(torch.compile(model, backend=recording)(x), model(x), rtol=1e-2)
    targets = {node.target for node in seen}
    assert {ops.masked_gemv, ops.router} | ({ops.masked_rows} if bits == 16 else set()) <= targets
    assert {matrix.bits for adapter in plan.adapters for matrix in adapter.matrices.values()} == {32 if bits == 16 else bits}
    assert len(plan.adapters) == {16: 4 * 3 + 4 + 7 + 4 + 1 + 3}.get(bits, 5 * 4)
