"""Plans with the same bytes in different dtypes have different digests."""

from __future__ import annotations

import torch

from rana_fx.adapter import Adapter
from rana_fx.plan import Plan


def test_equal_bytes_of_two_dtypes():
    bias = torch.randn(6).bfloat16()
    digests = set()
    for same_bytes in (bias, bias.view(torch.float16)):
        adapter = Adapter("a", "neuron", ("a",), 4, 2.0, torch.zeros(4), weight=torch.ones(4, 6), bias=same_bytes)
        digests.add(Plan("rana", "bytes", 0.3, 0, 10, "M", {}, (), (adapter,), ()).digest())
    assert len(digests) == 2
