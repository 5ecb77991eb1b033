"""Expected times of adapters and of a decoded token: sums over launches, what is fused, and which linears are left dense."""

from __future__ import annotations

import pytest
import torch

from rana_fx.kernels import cost
from rana_fx.kernels.cuda import implementations as tensor_core_rows
from rana_fx.kernels.triton import implementations as triton_rows

GPU = torch.device("cuda")
LAYERS = 3


@pytest.fixture(scope="module", autouse=True)
def h200():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "nearest", lambda device: cost.H200)
        patch.setattr(triton_rows, "_installed", lambda: True)
        patch.setattr(tensor_core_rows, "_device", lambda device: None)
        yield
