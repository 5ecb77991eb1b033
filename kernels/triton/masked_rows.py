"""h_TN = a_TN * (x_TK @ w_NK^T + bias) where a is not zero, 0 elsewhere, reading only rows of w where some token's a is not zero.

The up projection of a gated MLP whose activated gate a was masked. Program i_b takes BR rows and all of K, in fp32: it loads a
for them and reads a row, which is one stretch of memory, if any of its tokens keeps it; where none keeps any it reads nothing.
No split, so nothing to add up afterwards.

Up to 4 tokens share every row that is read; more are taken 4 at a time, from L2. Dropped outputs are selected away, whatever
their sums are.   Error: as masked_gemv.py, over K.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rana_fx.errors import BadOperand
from rana_fx.formats import is_plain
from rana_fx.kernels.triton.compaction import (
    loop_bound,
    sm_count_of,
    wait_for_previous,
    zero_accumulators,
)
from rana_fx.kernels.triton.config import EAGER, H200_SM_COUNT, TOKENS_AT_ONCE, Launch, cdiv, check_token_count
from rana_fx.kernels.triton.router import RouterConfig, add_products
from rana_fx.kernels.triton.router import default_config as router_config


def default_config(N: int, K: int, sm_count: int = H200_SM_COUNT, *, bits: int = 16) -> RouterConfig:
    """The router's for several tokens, so half of its rows for one token: dropped rows leave as many of the GPU's loads in flight
    unused, which more programs on a multiprocessor compensate. Not from a sweep.
    """
    return router_config(N, K, TOKENS_AT_ONCE, sm_count, bits=bits)


@triton.jit
def masked_rows_kernel(
    x, a, w, bias, h,
    T, N, K, s_xt, s_xk, s_at, s_an, s_wr, s_wc, s_bias, s_ht,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_b, i_t0 = tl.program_id(0), tl.program_id(1) * BT
    o_n = (i_b * BR + tl.arange(0, BR)).to(tl.int64)
    m_n = o_n < N
    # the previous kernel wrote which rows are needed: there is nothing to read before it is done
    wait_for_previous(PDL)
    m_any = o_n < 0
    b_as = ()
    for i_t in tl.static_range(BT):
        p_a = a + (i_t0 + i_t).to(tl.int64) * s_at + o_n * s_an
        b_a = tl.load(p_a, mask=m_n & (o_n * 0 + i_t0 + i_t < T), other=0.0).to(tl.float32)
        b_as = b_as + (b_a,)
        m_any = m_any | (b_a != 0)
    # a row beyond the last is not kept; its address is that of the last
    p_w = w + tl.minimum(o_n, N - 1)[:, None] * s_wr
    stop = tl.max(m_any.to(tl.int32), 0) * K
    b_sums = zero_accumulators(BT, BR, BK // 8)
    for k in tl.range(0, loop_bound(stop), BK, num_stages=STAGES):
        o_k = (k + tl.arange(0, BK)).to(tl.int64)
        m_w = m_any[:, None] & (o_k < K)[None, :]
        b_w = tl.load(p_w + o_k[None, :] * s_wc, mask=m_w, other=0, eviction_policy="evict_first")
        b_sums, _ = add_products(
            b_sums, b_sums, b_w, b_w, x, x, i_t0, k, T, K, 0, s_xt, s_xk, 0, BT, BR, BK, 16, BK, 1, False, False, 0.0
        )
    if HAS_BIAS:
        b_bias = tl.load(bias + o_n * s_bias, mask=m_n, other=0.0).to(tl.float32)
    for i_t in tl.static_range(BT):
        b_up = tl.sum(b_sums[i_t], 1)
        if HAS_BIAS:
            b_up += b_bias
        b_h = tl.where(b_as[i_t] != 0, b_as[i_t] * b_up, 0.0)
        p_h = h + (i_t0 + i_t).to(tl.int64) * s_ht + o_n
        tl.store(p_h, b_h.to(h.dtype.element_ty), mask=m_n & (o_n * 0 + i_t0 + i_t < T))


def masked_rows(
    x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    config: RouterConfig | None = None, how: Launch = EAGER,
) -> Tensor:  # fmt: skip
    """The kept rows' products in a's shape and x's dtype, in one launch.

    Args:
        x: (..., K) floating, T <= 16 rows in all. a: (..., N), as many rows. weight: (N, K) floating, any strides; rows that are
            not kept are not read where K has unit stride. bias: (N,).
        config: a router's, of N rows and K columns; nothing is read ahead. The default one if None.
        how: with ``pdl`` nothing is read before the previous kernel ends.

    Raises:
        BadOperand.
    """
    if weight.dim() != 2 or not is_plain(weight):
        got = f"{tuple(weight.shape)} {weight.dtype}"
        raise BadOperand(name="weight", got=got, expected="floating, (N, K)", todo="Unpack it first.")
    columns, width = weight.shape
    if x.dim() < 1 or x.shape[-1] != width or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}"
        raise BadOperand(name="x", got=got, expected=f"floating, (..., {width})", todo="Its last size is weight's last.")
    tokens = check_token_count("x", x)
    if a.dim() < 1 or a.shape[-1] != columns or a.numel() != tokens * columns or not a.is_floating_point():
        got, expected = f"{tuple(a.shape)} {a.dtype}", f"floating, (..., {columns}), of {tokens} tokens"
        raise BadOperand(name="a", got=got, expected=expected, todo="One value per token and row of weight.")
    if bias is not None and tuple(bias.shape) != (columns,):
        raise BadOperand(name="bias", got=str(tuple(bias.shape)), expected=f"({columns},)", todo="One number per row of weight.")
    config = config or default_config(columns, width, sm_count_of(x), bits=8 * weight.element_size())
    rows, gate = x.reshape(tokens, -1), a.reshape(tokens, -1)
    h = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    groups = cdiv(tokens, TOKENS_AT_ONCE)
    kernel = how.kernel(masked_rows_kernel)
    with how.on(x):
        # an argument that a variant never reads still needs a pointer
        kernel[(cdiv(columns, config.block_r), groups)](
            rows, gate, weight, x if bias is None else bias, h, tokens, columns, width,
            *rows.stride(), *gate.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), h.stride(0),
            BT=cdiv(tokens, groups), BR=config.block_r, BK=config.block_d, STAGES=config.stages, HAS_BIAS=bias is not None,
            num_warps=config.warps, **how.options,
        )  # fmt: skip
    return h.reshape(a.shape)
