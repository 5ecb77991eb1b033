"""Fusion of residuals into masked matmuls: sums that are fused, sums that are not and the reasons, and unchanged values."""

from __future__ import annotations

import pytest
import torch

from rana_fx.kernels.ops import masked_gemv
from tests.support.graphs import NONE, fused, mask, ops_of, reasons
from tests.support.products import DTYPES, assert_close

WIDTH, RANKS = 48, 20


RESIDUALS = {
    "left": lambda r, v, tau, w, c: r + masked_gemv(v, tau, w, c),
    "right": lambda r, v, tau, w, c: masked_gemv(v, tau, w, c) + r,
    "by name": lambda r, v, tau, w, c: torch.add(r, masked_gemv(v, tau, weight=w, bias=c, density=0.25)),
    "in place": lambda r, v, tau, w, c: masked_gemv(v, tau, w, c).add(r),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_is_taken_into_the_product(name, dtype):
    r, v = torch.randn(1, 3, WIDTH).to(dtype), torch.randn(1, 3, RANKS).to(dtype)
    tau, w, c = mask(RANKS), torch.randn(RANKS, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    module, counts = fused(RESIDUALS[name], r, v, tau, w, c)
    assert counts == NONE | {"residual": 1}
    assert ops_of(module) == ["masked_gemv_add"]
    node = next(node for node in module.graph.nodes if node.op == "call_function")
    assert node.args[5] == (0.25 if name == "by name" else 0.5)
    kept = torch.where(tau == 0, v.double(), 0)
    exact = r.double() + kept @ w.double() + c.double()
    magnitude = r.double().abs() + kept.abs() @ w.double().abs() + c.double().abs()
    assert_close("y", module(r, v, tau, w, c), exact, magnitude, terms=RANKS + 2)


KEPT = {
    "another reader": (lambda r, *operands: (r + (y := masked_gemv(*operands)), y * 2), "its output has 2 readers"),
    "scaled": (lambda r, *operands: torch.add(r, masked_gemv(*operands), alpha=2), "one addend is scaled"),
    "a number": (lambda r, *operands: masked_gemv(*operands) + 1.0, "it is added to no other tensor"),
    "one for all tokens": (lambda r, *operands: masked_gemv(*operands) + r[0, :1], "has another shape or dtype"),
    "wider": (lambda r, *operands: masked_gemv(*operands) + r.double(), "has another shape or dtype"),
    "itself": (lambda r, *operands: (y := masked_gemv(*operands)) + y, "it is added to no other tensor"),
    "a difference": (lambda r, *operands: r - masked_gemv(*operands), "its output is not added to anything"),
    "by columns": (lambda r, *operands: r.mT.contiguous().mT + masked_gemv(*operands), "the sum has another memory layout"),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_sums_are_left(name):
    function, reason = KEPT[name]
    r, v, tau, w = torch.randn(1, 3, WIDTH), torch.randn(1, 3, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH)
    module, counts = fused(function, r, v, tau, w)
    assert counts == NONE
    assert ops_of(module) == ["masked_gemv"]
    assert [found.endswith(reason) for found in reasons(module)["residual"]] == [True]


def test_sums_of_two_products():
    r, v, tau, w = torch.randn(2, WIDTH), torch.randn(2, RANKS), mask(RANKS), torch.randn(RANKS, WIDTH)

    def parallel(r, v, tau, w):
        return masked_gemv(v, tau, w) + masked_gemv(v * 2, tau, w) + r

    module, counts = fused(parallel, r, v, tau, w)
    assert counts["residual"] in (1, 2)
    torch.testing.assert_close(module(r, v, tau, w), parallel(r, v, tau, w))

    def in_turn(r, v, tau, w):
        return r + masked_gemv(v, tau, w) + masked_gemv(v * 2, tau, w)

    module, counts = fused(in_turn, r, v, tau, w)
    assert counts == NONE | {"residual": 2}
    torch.testing.assert_close(module(r, v, tau, w), in_turn(r, v, tau, w))
