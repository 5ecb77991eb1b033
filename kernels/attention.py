"""``rana::decode_attention``: attention of a few decoded tokens to the positions of a cache.

    y[b, h, t, :] = sum over s of p[s] * v[b, g, s, :]      p = softmax over s of (scale * q[b, h, t, :] . k[b, g, s, :] + mask)

Query head h reads head g = h // (H / G) of keys and values: heads of a cache are not repeated. A bool mask excludes positions
where it is False, a floating one is added. A row that excludes every position yields zeros, as in
``torch.nn.functional.scaled_dot_product_attention``. A position that no row attends to need not be read: whether a NaN there
reaches the result is unspecified. Sums and softmax are in fp32, or in fp64 for fp64. There is no backward pass.

Legend: B sequences, H query heads, G heads of keys and values, T tokens, S positions, D and E channels of keys and of values.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_fx.kernels.problem import DTYPES
from rana_fx.kernels.triton.config import MAX_TOKENS

MAX_CHANNELS = 256


def decode_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """(B, H, T, D), (B, G, S, D), (B, G, S, E), mask broadcastable to (B, H, T, S) -> (B, H, T, E) in q's dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(repeats, 1) for x in (k, v))
    scores = scale * (q.to(wide) @ keys.mT)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask).to(wide)
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    return by_tokens((weights @ values).to(q.dtype))


def by_tokens(y: Tensor) -> Tensor:
    """(B, H, T, E) with the memory layout of (B, T, H, E), which what follows reads without a copy."""
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def why_not_compiled(device: torch.device, dtype: torch.dtype, tokens: int, channels: tuple[int, int]) -> str | None:
    """The reason why no kernel computes a call of these sizes, or None. ``channels``: D and E."""
    if device.type != "cpu" and not (device.type == "cuda" and importlib.util.find_spec("triton") is not None):
        return f"no kernel computes it on {device.type}"
    if dtype not in DTYPES:
        return f"no kernel computes it in {dtype}"
    if not 1 <= tokens <= MAX_TOKENS:
        return f"{tokens} tokens, where kernels take 1 to {MAX_TOKENS}"
    return None if min(channels) >= 1 and max(channels) <= MAX_CHANNELS else f"more than {MAX_CHANNELS} channels in a head"


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])  # PyTorch takes no mask of one dimension
    return by_tokens(F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True))


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:  # noqa: ARG001
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (B, H, T, D), (B, G, S, D), (B, G, S, E)"
    torch._check(q.dim() == k.dim() == v.dim() == 4, lambda: shapes)
    torch._check(k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3], lambda: shapes)
    torch._check(q.shape[1] % k.shape[1] == 0, lambda: f"{shapes}, H a multiple of G")
    torch._check(q.dtype == k.dtype == v.dtype, lambda: f"q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one dtype")
    if mask is not None:
        scores = (*q.shape[:3], k.shape[2])
        torch._check(mask.dim() <= 4, lambda: f"mask {tuple(mask.shape)}: expected at most 4 dimensions")
        torch._check(mask.expand(scores).shape == scores, lambda: f"mask {tuple(mask.shape)}: expected {scores}")
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


_LIBRARY = torch.library.Library("rana", "FRAGMENT")
_LIBRARY.define("decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, float scale=1.) -> Tensor")
_LIBRARY.impl("decode_attention", _eager, "CompositeExplicitAutograd")
torch.library.register_fake("rana::decode_attention", _fake, lib=_LIBRARY)

decode_attention = torch.ops.rana.decode_attention.default
