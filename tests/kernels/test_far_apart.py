"""Elements more than 2^31 apart: offsets are computed in 64 bits. Operands are views of a file of zeros that takes no space, or
of memory of the GPU, whose rows lie so far apart; wrapped around at 32 bits, an offset would still lie inside and read zeros."""

from __future__ import annotations

import pytest
import torch

from rana_fx.formats import pack, unpack
from rana_fx.kernels.ops import implementation, masked_gemv, masked_gemv_parts, masked_rows, router
from tests.support.inductor import GEMV, ROUTER, calls, each
from tests.support.products import kernels_run_on

STEP = 2**30 - 64  # between rows: the fourth is beyond 2^31, and wrapped around 2^30 in front of the first
TOKENS, K, N = 4, 32, 64


@pytest.fixture
def apart(tmp_path):
    """A function that puts rows of numbers STEP apart, on a device, and returns that view."""
    taken = []

    def put(rows, device):
        count, width = rows.shape
        span = 2**30 + (count - 1) * STEP + width
        if device.type == "cpu":
            file = tmp_path / f"{len(taken)}.bin"
            base = torch.from_file(str(file), shared=True, size=span, dtype=rows.dtype)
        else:
            base = torch.zeros(span, dtype=rows.dtype, device=device)
        taken.append(base)
        view = base.as_strided((count, width), (STEP, 1), 2**30)
        view.copy_(rows)
        return view

    yield put
    taken.clear()
    for file in tmp_path.iterdir():
        file.unlink()


def close(got, exact):
    torch.testing.assert_close(got.double().cpu(), exact, rtol=2e-2, atol=2e-2)


def values(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def test_triton(device, apart):
    """Tokens, gates and rows of weights."""
    kernels_run_on(device)
    v, w, tau, rows = values(TOKENS, K), values(K, N), torch.full((K,), 0.3), values(N, K)
    exact = torch.where(v.double().square() < tau, 0.0, v.double()) @ w.double()
    far, on = apart(v, device), [value.to(device) for value in (tau, w)]
    weights = apart(values(4, N), device)  # K of 4
    with implementation("triton"):
        close(masked_gemv(far, *on), exact)
        close(masked_gemv_parts(far, [on[0]] * 2, [on[1]] * 2, [], 0.5), torch.cat([exact, exact], -1))
        close(router(far, rows.to(device)), v.double() @ rows.double().t())
        gate = apart(values(TOKENS, N), device)
        close(masked_rows(far, gate, rows.to(device)), gate.double().cpu() * (v.double() @ rows.double().t()))
        close(masked_gemv(v[:, :4].to(device), on[0][:4] * 0, weights), v[:, :4].double() @ weights.double().cpu())
        close(router(values(TOKENS, N).to(device), weights), values(TOKENS, N).double() @ weights.double().cpu().t())


@pytest.mark.parametrize("bits", [8, 4])
def test_triton_packed(device, apart, bits):
    kernels_run_on(device)
    v, (weight, scale), tau = values(TOKENS, 4), pack(values(4, N), bits), torch.zeros(4)
    exact = v.double() @ unpack(weight, scale, torch.float64)
    with implementation("triton"):
        got = masked_gemv(v.to(device), tau.to(device), apart(weight, device), None, scale.to(device))
    close(got, exact)


def test_cpp(apart):
    """Rows of weights, in every storage, and tokens."""
    cpu, v, x, tau = torch.device("cpu"), values(TOKENS, 4), values(TOKENS, N), torch.zeros(4)
    stored = [(values(4, N), None), *(pack(values(4, N), bits) for bits in (8, 4))]
    tokens, far = apart(v, cpu), [apart(weight, cpu) for weight, _ in stored]

    def both(tokens, tau, far, scale, x):
        return masked_gemv(tokens, tau, far, None, scale), router(x, far, scale)

    results, code = each(both, [(tokens, tau, rows, scale, x) for rows, (_, scale) in zip(far, stored, strict=True)])
    assert calls(code, GEMV) == calls(code, ROUTER) == len(stored)
    for (weight, scale), (y, z) in zip(stored, results, strict=True):
        w = unpack(weight, scale, torch.float64)
        close(y, v.double() @ w)
        close(z, x.double() @ w.t())
