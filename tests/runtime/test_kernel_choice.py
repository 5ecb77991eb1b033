"""``explain`` names the kernel of each adapted linear, and why it is not the fastest of the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import rana_fx
from rana_fx.adapter import Adapter
from rana_fx.formats import pack
from rana_fx.kernels import cost
from rana_fx.kernels.cpp import integers
from rana_fx.kernels.cuda import implementations as tensor_core_rows
from rana_fx.kernels.triton import implementations as triton_rows
from rana_fx.plan import SiteRecord
from rana_fx.report_rows import Row, kernels
from rana_fx.runtime.kernel_choice import KernelChoice, kernel_choice
from tests.golden import check
from tests.golden.model import ids

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OTHER = "is for compute capability 9.0, this GPU has 8.0"
SIZE = 4096


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends a GPU, where the kernels on tensor cores are declined for a reason, or not for None."""

    def make(reason):
        monkeypatch.setattr(cost, "nearest", lambda device: cost.H200)
        monkeypatch.setattr(triton_rows, "_installed", lambda: True)
        monkeypatch.setattr(tensor_core_rows, "_device", lambda device: reason)

    return make


def masked(bits=None):
    """An adapter with an input mask that keeps an eighth, and its sites. Its weight: the model's own in bfloat16, or in bits."""
    stored = {}
    if bits is not None:
        weight, scale = pack(torch.ones(SIZE, SIZE), bits)
        stored = dict(weight=weight, weight_scale=scale)
    adapter = Adapter("a", "neuron", ("a",), SIZE, SIZE / 8, torch.zeros(SIZE), **stored)
    return adapter, {"a": SiteRecord("a", "up", "linear", SIZE, SIZE, False, 1, True, "bfloat16", "")}


@pytest.mark.parametrize("bits", [4, 8])
def test_tensor_cores_or_the_reason_why_not(gpu, bits):
    gpu(None)
    assert kernel_choice(*masked(bits), GPU) == KernelChoice("tensor_cores")
    gpu(OTHER)
    assert kernel_choice(*masked(bits), GPU) == KernelChoice("triton", f"tensor_cores: {OTHER}")


def test_of_exact_outputs_the_masked_matmul_counts(gpu):
    gpu(None)
    adapter, sites = masked(8)
    router = torch.zeros(SIZE, SIZE, dtype=torch.bfloat16)
    exact = dataclasses.replace(adapter, kind="rank", router=router, exact_tau=torch.zeros(SIZE), exact_kept=1.0)
    assert kernel_choice(exact, sites, GPU).name == "tensor_cores"


@pytest.mark.parametrize(("dot", "slower"), [("vnni", ""), ("maddubs", ""), (None, "integer products: Inductor's")])
def test_integer_products_of_a_cpu(monkeypatch, dot, slower):
    monkeypatch.setattr(integers, "facts", lambda dtype: {"dot": dot})
    for bits in (4, 8):
        found = kernel_choice(*masked(bits), CPU)
        assert found.name == "cpp" and found.slower.startswith(slower) and bool(found.slower) == bool(slower)
    # numbers in the model's dtype are no integers
    assert kernel_choice(*masked(), CPU) == KernelChoice("cpp")


def test_explain_names_the_kernels():
    model = check.adapted("hybrid-stored")
    report = rana_fx.explain(model, ids())
    rows = [row for row in report.rows if row.masked_tokens]
    assert rows and {row.kernel for row in rows} == {"cpp"}
    assert all(row.kernel == row.slower == "" for row in report.rows if not row.masked_tokens)
    assert f"masked kernels (cpp {len(rows)}), for up to" in str(report)


def row(**facts):
    return Row("a", "up", "linear", (8, 8), "neuron", "", 0.5, 0.5, None, 16, **facts)


def test_the_summary_counts_them_and_names_the_most_frequent_reason():
    slower = dict(kernel="triton", slower=f"tensor_cores: {OTHER}")
    rows = [row(kernel="tensor_cores"), *[row(**slower)] * 2, row(kernel="triton", slower="tensor_cores: sizes vary")]
    text = " ".join(" ".join(kernels(rows)).split())
    assert "4 of 4 adapted linears run as masked kernels (triton 3, tensor_cores 1), for up to 16 tokens at once" in text
    assert f"2 of them not in the fastest kernel of this device, tensor_cores: {OTHER}" in text and "sizes vary" not in text
    assert "fastest" not in " ".join(kernels([row(kernel="tensor_cores")]))
