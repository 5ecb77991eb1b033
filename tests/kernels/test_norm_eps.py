"""The norm in front of a router adds eps, which matters for a tensor with a mean square as small as eps."""

from __future__ import annotations

import pytest
import torch

from rana_fx.kernels.ops import implementation, normed_router
from tests.support.products import kernels_run_on


@pytest.mark.parametrize("who", ["reference", "triton"])
def test_eps_counts_where_the_input_is_small(device, who):
    if who == "triton":
        kernels_run_on(device)
    h = torch.full((1, 16), 1e-3, device=device)  # its mean square is 1e-6
    with implementation(who):
        got = normed_router(h, None, torch.eye(16, device=device), None, 3e-6, 0.0)
    torch.testing.assert_close(got, torch.full_like(h, 0.5), rtol=1e-5, atol=0)
