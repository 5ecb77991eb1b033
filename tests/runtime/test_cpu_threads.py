"""One thread for each core of those that the process may run on, within the quota of its container."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.graph import GraphLowering

import rana_fx
from rana_fx.formats import pack
from rana_fx.kernels.ops import masked_gemv
from rana_fx.runtime import cpu_threads


@pytest.fixture
def processors(tmp_path):
    """Six processors on three cores."""
    for number in range(6):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 3},{number % 3 + 3}\n")
    return tmp_path


@pytest.mark.parametrize(("allowed", "expected"), [({0, 1, 2, 3, 4, 5}, 3), ({0, 3}, 1), ({0, 4, 5}, 3), ({0, 17}, None)])
def test_hyperthreads_are_one_core(processors, allowed, expected):
    assert cpu_threads.cores(processors, allowed) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", None), ("250000 100000", 2), ("50000 100000", 1), ("100000 0", None), ("x y", None), ("", None)],
)
def test_quota(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert cpu_threads.quota(tmp_path) == expected


@pytest.mark.parametrize(("text", "expected"), [("-1", None), ("300000", 3), ("20000", 1), (None, None)])
def test_quota_of_version_1(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(text + "\n")
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cpu_threads.quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("found", "limit", "environment", "expected"),
    [(1, None, None, 1), (1, 1, "2", 2), (3, None, None, 2), (None, None, None, 2), (2, 1, None, 1), (None, 1, None, 1)],
)
def test_threads_are_set(monkeypatch, found, limit, environment, expected):
    """Not above what PyTorch has, nor where the user chose."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    monkeypatch.setattr(cpu_threads, "cores", lambda: found)
    monkeypatch.setattr(cpu_threads, "quota", lambda: limit)
    try:
        torch.set_num_threads(2)
        cpu_threads.one_thread_per_core()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_number_changed_after_compilation_is_used(monkeypatch):
    """Also without guards on modules: Dynamo's on the number of threads is none of them."""
    codes: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(codes.append))
    generator = torch.Generator().manual_seed(0)
    v, tau = torch.randn(1, 256, generator=generator), torch.zeros(256)
    operands = (v, tau, *pack(torch.randn(256, 512, generator=generator), 8))
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    torch._dynamo.reset()
    run = torch.compile(lambda v, tau, w, s: masked_gemv(v, tau, w, None, s), backend=rana_fx.backend, options=options)
    before, results = torch.get_num_threads(), []
    try:
        with torch._inductor.config.patch(fx_graph_cache=False):
            for number in (2, 1, 2):
                torch.set_num_threads(number)
                results.append(run(*operands))
    finally:
        torch.set_num_threads(before)
        torch._dynamo.reset()
    # the third call finds the first code
    assert [set(re.findall(r"\bnum_threads\((\d+)\)", code)) for code in codes] == [{"2"}, {"1"}]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
