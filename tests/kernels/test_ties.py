"""All implementations keep a value exactly at its threshold: squares of small integers are exact in every dtype."""

from __future__ import annotations

import pytest
import torch

from rana_fx.kernels import reference
from rana_fx.kernels.ops import implementation, masked_gemv
from tests.support.inductor import GEMV, compiled
from tests.support.products import kernels_run_on

V = torch.tensor([[2.0, -3.0, 2.0, 1.0]])
TAU = torch.tensor([4.0, 9.0, 5.0, 0.5])
KEPT = [True, True, False, True]
EXPECTED = torch.where(torch.tensor(KEPT), V, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference(dtype):
    assert reference.kept(V.to(dtype), TAU).tolist() == [KEPT]
    assert torch.equal(masked_gemv(V.to(dtype), TAU, torch.eye(4, dtype=dtype)), EXPECTED.to(dtype))


def test_triton(device):
    kernels_run_on(device)
    with implementation("triton"):
        got = masked_gemv(V.to(device), TAU.to(device), torch.eye(4, device=device))
    assert torch.equal(got, EXPECTED.to(device))


def test_cpp():
    got, code = compiled(masked_gemv, V, TAU, torch.eye(4))
    assert GEMV in code
    assert torch.equal(got, EXPECTED)


def test_gradient():
    v = V.clone().requires_grad_()
    masked_gemv(v, TAU, torch.eye(4)).sum().backward()
    assert (v.grad != 0).tolist() == [KEPT]
