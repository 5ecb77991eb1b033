"""z_TR = x_TD @ w_RD^T, and in the same launch, for each block of ranks, the list of those that will be kept.

Program i_b takes BR rows and all of D, in fp32, and lists the ranks of its block with z^2 >= tau for some token, z as rounded to
its stored dtype: the product that follows then finds its ranks by a prefix of counts and compacts nothing itself. D is not split:
R / BR programs fill the GPU down to BR = 1 wherever a router is worth a kernel (R >= 264), and a split would need a second
launch for the sums, after which nothing could be listed in this one.

w is floating, int8 with a scale per row, or 4 bits with a scale per row and group of columns, multiplied out in registers.
T <= 4 tokens on the spot, up to 16 by tl.dot.   Error: as masked_gemv.py, over D.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rana_fx.errors import BadOperand
from rana_fx.kernels.config import H200_SM_COUNT, MAX_TOKENS, Lists, cdiv
from rana_fx.kernels.gather import INTERPRETED, trips
from rana_fx.kernels.int4 import nibble_units, nibbles, words
from rana_fx.kernels.quantize import group_of, shape_of


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """block_r: rows of a program, and ranks of a list. block_d: columns at a time."""

    block_r: int = 8
    block_d: int = 512
    warps: int = 4
    stages: int = 3


CONFIGS = [RouterConfig(r, d, w, s) for r in (4, 8) for d in (512, 1024) for w in (4, 8) for s in (1, 3)]


def default_config(R: int, D: int, T: int = 1, sm_count: int = H200_SM_COUNT) -> RouterConfig:
    """Two to four programs per SM, 4096 weights at a time in each."""
    block_r = 16
    while block_r > 1 and cdiv(R, block_r) < 2 * sm_count:
        block_r //= 2
    if T > 4:
        return RouterConfig(16, 128, 4, 3)
    columns = 1 << max(D - 1, 0).bit_length()
    return RouterConfig(block_r, min(max(4096 // (block_r * (1 << (T - 1).bit_length())), 128), max(columns, 16)), 4, 3)


@triton.jit
def load_inputs(x, o_d, m_d, T, s_xt, s_xd, BT: tl.constexpr):
    """x at columns o_d, fp32: (BD,) for one token, else (BT, BD)."""
    if BT == 1:
        b_x = tl.load(x + o_d * s_xd, mask=m_d, other=0.0, eviction_policy="evict_last").to(tl.float32)
    else:
        o_t = tl.arange(0, BT)
        p_x = x + o_t.to(tl.int64)[:, None] * s_xt + o_d[None, :] * s_xd
        b_x = tl.load(p_x, mask=(o_t < T)[:, None] & m_d[None, :], other=0.0, eviction_policy="evict_last").to(tl.float32)
    return b_x


@triton.jit
def add_columns(b_sum, b_x, b_w, BT: tl.constexpr, DOT: tl.constexpr, OPERAND: tl.constexpr):
    if DOT:
        b_sum = tl.dot(b_x.to(OPERAND), tl.trans(b_w.to(OPERAND)), b_sum, input_precision="tf32x3")
    elif BT == 1:
        b_sum += b_w.to(tl.float32) * b_x[None, :]
    else:
        b_sum += b_w.to(tl.float32)[None, :, :] * b_x[:, None, :]
    return b_sum


@triton.jit
def router_kernel(
    x, w, scale, tau, z, lists, counts,
    T, R, D, s_xt, s_xd, s_wr, s_wd, s_sr, s_sg, s_tau, s_zt,
    BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, QG: tl.constexpr, PER: tl.constexpr,
    DOT: tl.constexpr, NARROW: tl.constexpr, LISTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # a row is D words long, of one number each, or of PER nibbles
    PACKED: tl.constexpr = PER > 1
    OPERAND: tl.constexpr = x.dtype.element_ty if NARROW else tl.float32
    WORDS: tl.constexpr = QG // PER if PACKED else BD
    i_b = tl.program_id(0)
    o_r = i_b * BR + tl.arange(0, BR)
    m_r = o_r < R
    if DOT:
        b_sum = tl.zeros((BT, BR), tl.float32)
    elif BT == 1:
        b_sum = tl.zeros((BR, BD), tl.float32)
    else:
        b_sum = tl.zeros((BT, BR, BD * PER), tl.float32)
    for d in tl.range(0, trips(D), BD, num_stages=STAGES):
        o_d = (d + tl.arange(0, BD)).to(tl.int64)
        m_d = o_d < D
        p_w = w + o_r.to(tl.int64)[:, None] * s_wr + o_d[None, :] * s_wd
        b_w = tl.load(p_w, mask=m_r[:, None] & m_d[None, :], other=0, eviction_policy="evict_first")
        o_x = (d * PER + tl.arange(0, BD * PER)).to(tl.int64)
        b_x = load_inputs(x, o_x, o_x < D * PER, T, s_xt, s_xd, BT)
        if PACKED:
            o_g = (d // WORDS + tl.arange(0, BD // WORDS)).to(tl.int64)
            p_scale = scale + o_r.to(tl.int64)[:, None] * s_sr + o_g[None, :] * s_sg
            m_scale = m_r[:, None] & (o_g * WORDS < D)[None, :]
            b_scale = tl.load(p_scale, mask=m_scale, other=0.0, eviction_policy="evict_first").to(tl.float32)
            b_w = nibbles(tl.reshape(b_w, (BR, BD // WORDS, WORDS)), PER)
            if BT == 1:
                # the scale once per word, after the sum over its nibbles
                b_part = b_w * (tl.reshape(b_x, (BD, PER)) * nibble_units(PER)[None, :]).reshape(1, BD // WORDS, WORDS, PER)
                b_sum += tl.reshape(tl.sum(b_part, 3) * b_scale[:, :, None], (BR, BD))
            else:
                b_w = b_w * nibble_units(PER)[None, None, None, :] * b_scale[:, :, None, None]
                b_sum = add_columns(b_sum, b_x, tl.reshape(b_w, (BR, BD * PER)), BT, DOT, OPERAND)
        else:
            b_sum = add_columns(b_sum, b_x, b_w, BT, DOT, OPERAND)
    if DOT:
        b_z = b_sum
    elif BT == 1:
        b_z = tl.sum(b_sum, 1)[None, :]
    else:
        b_z = tl.sum(b_sum, 2)
    if w.dtype.element_ty == tl.int8:
        b_z *= tl.load(scale + o_r.to(tl.int64) * s_sr, mask=m_r, other=0.0).to(tl.float32)[None, :]
    b_z = b_z.to(z.dtype.element_ty)
    o_t = tl.arange(0, BT)
    m_z = (o_t < T)[:, None] & m_r[None, :]
    tl.store(z + o_t.to(tl.int64)[:, None] * s_zt + o_r[None, :], b_z, mask=m_z)
    if LISTED:
        b_tau = tl.load(tau + o_r.to(tl.int64) * s_tau, mask=m_r, other=0.0).to(tl.float32)
        b_wide = b_z.to(tl.float32)
        b_one = tl.max((m_z & (b_wide * b_wide >= b_tau[None, :])).to(tl.int32), 0)
        tl.store(lists + i_b * BR + tl.cumsum(b_one, 0) - 1, o_r, mask=b_one > 0)
        tl.store(counts + i_b, tl.sum(b_one, 0))


def router(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, config: RouterConfig | None = None, traced: bool = False
) -> Tensor:
    """z, (..., R) in x's dtype.

    Args:
        x: (..., D) floating with T <= 16 rows. weight, scale: (R, D) as quantize.py stores it. config: the default one if None.
        traced: leave the launch in the graph that is being traced, for Inductor to generate (torch.library.wrap_triton).

    Raises:
        BadOperand.
    """
    return _launch(x, weight, scale, None, config, traced)[0]


def router_listed(
    x: Tensor, weight: Tensor, tau: Tensor, scale: Tensor | None = None, *,
    config: RouterConfig | None = None, traced: bool = False,
) -> tuple[Tensor, Lists]:  # fmt: skip
    """z, and the lists of ranks that ``masked_gemv`` with this z and tau would keep. tau is (R,); the rest as for ``router``."""
    z, lists = _launch(x, weight, scale, tau, config, traced)
    assert lists is not None
    return z, lists


def _launch(
    x: Tensor, weight: Tensor, scale: Tensor | None, tau: Tensor | None, config: RouterConfig | None, traced: bool
) -> tuple[Tensor, Lists | None]:
    ranks, columns = shape_of(weight, scale)
    if x.dim() < 1 or x.shape[-1] != columns or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}"
        raise BadOperand(name="x", got=got, expected=f"floating, (..., {columns})", todo="Its last size is weight's last.")
    tokens = math.prod(x.shape[:-1])
    if not 1 <= tokens <= MAX_TOKENS:
        raise BadOperand(name="x", got=f"{tokens} tokens", expected=f"1 to {MAX_TOKENS}", todo="Use the reference for more.")
    if tau is not None and tuple(tau.shape) != (ranks,):
        raise BadOperand(name="tau", got=str(tuple(tau.shape)), expected=f"({ranks},)", todo="One threshold per rank.")
    sm_count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else H200_SM_COUNT
    config = config or default_config(ranks, columns, tokens, sm_count)
    packed, dot = weight.dtype == torch.uint8, tokens > 4
    group = group_of(weight, scale) if packed and scale is not None else 0
    weight, per_word = words(weight) if packed else (weight, 1)
    block_r = max(config.block_r, 16) if dot else config.block_r
    blocks = cdiv(ranks, block_r)
    rows, z = x.reshape(tokens, -1), torch.empty((tokens, ranks), dtype=x.dtype, device=x.device)
    lists = None
    if tau is not None:
        entries = torch.empty((blocks, block_r), dtype=torch.int32, device=x.device)
        lists = Lists(entries, torch.empty(blocks, dtype=torch.int32, device=x.device))
    strides = (0, 0) if scale is None else (scale.stride(0), scale.stride(1) if packed else 0)
    # the interpreter takes bfloat16 for integers
    narrow = x.dtype == weight.dtype and x.dtype.itemsize == 2 and not (INTERPRETED and x.dtype == torch.bfloat16)
    kernel = torch.library.wrap_triton(router_kernel) if traced else router_kernel
    with contextlib.nullcontext() if traced else torch.cuda.device_of(x):
        # arguments that a variant never reads still need a pointer
        kernel[(blocks,)](
            rows, weight, x if scale is None else scale, x if tau is None else tau, z, *(lists or (x, x)), tokens, ranks,
            weight.shape[1], *rows.stride(), *weight.stride(), *strides, 0 if tau is None else tau.stride(0), ranks,
            BT=16 if dot else triton.next_power_of_2(tokens), BR=block_r, BD=max(config.block_d, group) // per_word, QG=group,
            PER=per_word, DOT=dot, NARROW=narrow, LISTED=tau is not None, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip
    return z.reshape(*x.shape[:-1], ranks), lists
