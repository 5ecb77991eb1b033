"""y_TN = c_N + sum over k with v_Tk^2 >= tau_k of v_Tk * w_kN, reading only the rows of w that some token keeps.

One launch: program (i_n, i_s) lists the active ranks of its slice (gather.py) and adds their rows, BN outputs wide and BM rows at
a time, in fp32. S slices leave partials (S, T, N) in fp32; whoever adds them up (Inductor, or ``masked_gemv`` here) fuses bias
and what follows. With S = 1 the result is written directly. No atomics, nothing to zero, the same bits in every run.

w is (K, N), rank-major: floating, int8 with a scale per row (folded into v: free), or 4 bits (int4.py). Any strides; with
unit stride along N rows are read 16 bytes at a time. T <= 4 tokens are multiplied on the spot, up to 16 by tl.dot over the
union of their masks; at independent masks of 50 % that union is everything from T = 5 on, so dense is the rival there (cost.py).

Error: products and sums in fp32, relative RMSE <= 4 * eps(fp32) * sqrt(log2 K + 1) before the result is rounded to v's dtype.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rana_fx.errors import BadOperand, InvalidOption
from rana_fx.kernels.config import H200_SM_COUNT, MAX_TOKENS, Config, Lists, default_config
from rana_fx.kernels.gather import INTERPRETED, add_rows, empty_sums, finish_sums, load_values, next_ranks, open_ranks, trips
from rana_fx.kernels.int4 import masked_gemv_int4_kernel, words
from rana_fx.kernels.quantize import bits_of, group_of, shape_of

SOURCES = {"scratch": 0, "registers": 1}
LISTED = 2


@triton.jit
def masked_gemv_kernel(
    v, tau, w, scale, bias, out, lists, counts,
    T, K, N, s_vt, s_vk, s_tau, s_wk, s_wn, s_sk, s_bias, s_os, s_ot,
    S: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOURCE: tl.constexpr,
    DOT: tl.constexpr, NARROW: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    OPERAND: tl.constexpr = v.dtype.element_ty if NARROW else tl.float32
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    i_list = (i_s * tl.num_programs(0) + i_n).to(tl.int64)
    b_first, b_second, n_active = open_ranks(
        v, tau, lists, counts, i_s, i_list, T, K, s_vt, s_vk, s_tau, S, KS, KB, GROUP, BT, SOURCE
    )
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_sum = empty_sums(BT, BM, BN, DOT)
    for j in tl.range(0, trips(n_active), BM, num_stages=STAGES):
        o_p = j + tl.arange(0, BM)
        m_p = o_p < n_active
        b_k = next_ranks(lists, b_first, b_second, i_s, i_list, o_p, m_p, S, KB, BR, SOURCE)
        p_w = w + b_k.to(tl.int64)[:, None] * s_wk + o_n[None, :] * s_wn
        b_w = tl.load(p_w, mask=m_p[:, None] & m_n[None, :], other=0.0, eviction_policy="evict_first")
        b_v = load_values(v, tau, b_k, m_p, T, s_vt, s_vk, s_tau, BT)
        if w.dtype.element_ty == tl.int8:
            b_scale = tl.load(scale + b_k.to(tl.int64) * s_sk, mask=m_p, other=0.0).to(tl.float32)
            b_v *= b_scale
        b_sum = add_rows(b_sum, b_v, b_w, BT, DOT, OPERAND)
    b_y = finish_sums(b_sum, BT, DOT)
    if HAS_BIAS:
        b_y += tl.load(bias + o_n * s_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_t = tl.arange(0, BT)
    p_out = out + i_s.to(tl.int64) * s_os + o_t.to(tl.int64)[:, None] * s_ot + o_n[None, :]
    tl.store(p_out, b_y.to(out.dtype.element_ty), mask=(o_t < T)[:, None] & m_n[None, :])


def partials(
    v: Tensor, tau: Tensor, weight: Tensor, scale: Tensor | None = None, *,
    config: Config, lists: Lists | None = None, traced: bool = False,
) -> Tensor:  # fmt: skip
    """The one launch: (S, T, N) fp32 whose sum over S is the product.

    Args:
        v: (..., K) floating with T <= 16 rows. tau: (K,). weight, scale: as quantize.py stores them, K rows.
        config: every choice; S = config.splits.
        lists: what ``router_listed`` wrote for this v and tau; then nothing is compacted here.
        traced: leave the launch in the graph that is being traced, for Inductor to generate (torch.library.wrap_triton).

    Raises:
        BadOperand, InvalidOption.
    """
    rows, columns = _check(v, tau, weight, scale)
    out = torch.empty((config.splits, rows, columns), dtype=torch.float32, device=v.device)
    _launch(v.reshape(rows, -1), tau, weight, scale, None, out, config, lists, traced)
    return out


def masked_gemv(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, *,
    config: Config | None = None, lists: Lists | None = None,
) -> Tensor:  # fmt: skip
    """(..., N) in v's dtype. Arguments and errors as for ``partials``; bias is (N,)."""
    rows, columns = _check(v, tau, weight, scale)
    if bias is not None and tuple(bias.shape) != (columns,):
        raise BadOperand(name="bias", got=str(tuple(bias.shape)), expected=f"({columns},)", todo="One number per output.")
    sm_count = torch.cuda.get_device_properties(v.device).multi_processor_count if v.is_cuda else H200_SM_COUNT
    config = config or default_config(v.shape[-1], columns, rows, sm_count=sm_count, bytes_per_weight=bits_of(weight) / 8)
    if config.splits > 1:
        y = partials(v, tau, weight, scale, config=config, lists=lists).sum(0)
        y = y if bias is None else y + bias
        return y.to(v.dtype).reshape(*v.shape[:-1], columns)
    out = torch.empty((1, rows, columns), dtype=v.dtype, device=v.device)
    _launch(v.reshape(rows, -1), tau, weight, scale, bias, out, config, lists, False)
    return out.reshape(*v.shape[:-1], columns)


def _check(v: Tensor, tau: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[int, int]:
    """(T, N)."""
    ranks, columns = shape_of(weight, scale)
    if v.dim() < 1 or v.shape[-1] != ranks or not v.is_floating_point():
        got = f"{tuple(v.shape)} {v.dtype}"
        raise BadOperand(name="v", got=got, expected=f"floating, (..., {ranks})", todo="Its last size is weight's first.")
    if tuple(tau.shape) != (ranks,):
        raise BadOperand(name="tau", got=str(tuple(tau.shape)), expected=f"({ranks},)", todo="One threshold per rank.")
    tokens = math.prod(v.shape[:-1])
    if not 1 <= tokens <= MAX_TOKENS:
        raise BadOperand(name="v", got=f"{tokens} tokens", expected=f"1 to {MAX_TOKENS}", todo="Use the reference for more.")
    return tokens, columns


def _launch(
    v: Tensor, tau: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, config: Config,
    lists: Lists | None, traced: bool,
) -> None:  # fmt: skip
    if config.source not in SOURCES:
        raise InvalidOption(name="source", got=config.source, expected=f"one of {', '.join(SOURCES)}")
    tokens, ranks = v.shape
    columns = out.shape[-1]
    dot = tokens > 4
    token_block = 16 if dot else triton.next_power_of_2(tokens)
    if lists is None:
        source, per_block, slice_size, count_from = SOURCES[config.source], 1, config.slice_ranks(ranks), ranks
    else:
        source, (count_from, per_block) = LISTED, lists.ranks.shape
        slice_size = triton.cdiv(count_from, config.splits)
    block = triton.next_power_of_2(slice_size)
    packed = weight.dtype == torch.uint8
    group = group_of(weight, scale) if packed and scale is not None else 0
    block_n = max(config.block_n, group)
    grid = (triton.cdiv(columns, block_n), config.splits)
    # arguments that a variant never reads still need a pointer
    ranks_, counts_ = (v, v) if lists is None else (lists.ranks.contiguous(), lists.counts)
    if source == SOURCES["scratch"]:
        ranks_ = torch.empty(grid[0] * grid[1] * block, dtype=torch.int32, device=v.device)
    scale_, bias_ = v if scale is None else scale, v if bias is None else bias
    meta = dict(
        S=config.splits, KS=slice_size, KB=block, GROUP=config.group, BR=per_block, BT=token_block,
        BM=max(config.block_m, 16) if dot else config.block_m, BN=block_n, SOURCE=source, DOT=dot, NARROW=_narrow(v, weight),
        HAS_BIAS=bias is not None, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    kernel, steps = masked_gemv_kernel, 1
    if packed:
        weight, per_word = words(weight)
        kernel, steps = masked_gemv_int4_kernel, 2
        meta.update(QG=group, PER=per_word)
    kernel = torch.library.wrap_triton(kernel) if traced else kernel
    with contextlib.nullcontext() if traced else torch.cuda.device_of(v):
        kernel[grid](
            v, tau, weight, scale_, bias_, out, ranks_, counts_, tokens, count_from, weight.shape[1], *v.stride(), *tau.stride(),
            *weight.stride(), *scale_.stride()[:steps], bias_.stride(0), *out.stride()[:2], **meta,
        )  # fmt: skip


def _narrow(v: Tensor, weight: Tensor) -> bool:
    """Whether tl.dot multiplies 16-bit numbers as they are, or all as fp32. The interpreter takes bfloat16 for integers."""
    return v.dtype == weight.dtype and v.dtype.itemsize == 2 and not (INTERPRETED and v.dtype == torch.bfloat16)
