"""Operands of ``decode_attention``, its fp64 result, and a bound on the error of a kernel.

A score is wrong by at most d = 4 eps sqrt(log2 D + 1) of the magnitude of its terms, which changes the weights of its row by a
factor of 1 + 2 d; the sum of weighted values adds an error of its own (``assert_close``, tests/support/products.py).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st

from tests.support.products import DTYPES, assert_close, strided

MASKS = ("none", "prefix", "some", "added", "of heads", "nothing", "one row of nothing", "of tokens")


@dataclasses.dataclass(frozen=True)
class Attention:
    """q (B, H, T, D), k (B, G, S, D), v (B, G, S, E), a mask that broadcasts to (B, H, T, S), or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float

    @property
    def operands(self):
        return self.q, self.k, self.v, self.mask, self.scale

    def check(self, y):
        """Assert that y is the result, in its dtype, within the bound, and laid out by tokens."""
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores, sizes = self.scale * (q @ k.mT), abs(self.scale) * (q.abs() @ k.abs().mT)
        if self.mask is not None:
            added = torch.where(self.mask, 0.0, -math.inf) if self.mask.dtype == torch.bool else self.mask
            scores, sizes = scores + added.double(), sizes + added.double().nan_to_num(neginf=0).abs()
        weights = scores.softmax(-1).nan_to_num(0.0)
        exact, magnitude = weights @ v, weights @ v.abs()
        magnitude = magnitude * (3 + 2 * sizes.amax(-1, keepdim=True))
        assert y.dtype == self.q.dtype
        by_tokens = torch.empty_like(y.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        assert all(n == 1 or a == b for n, a, b in zip(y.shape, y.stride(), by_tokens.stride(), strict=True))
        assert_close("y", y, exact, magnitude, terms=max(q.shape[-1], v.shape[-2]))


def attention(
    batch, groups, repeats, tokens, positions, channels, *, values=None, dtype=torch.float32, mask="none", kind="contiguous"
):
    """Random operands; ``kind``: strides of q, k and v."""
    heads, values = groups * repeats, values or channels
    generator = torch.Generator().manual_seed(tokens * positions + channels)

    def drawn(*sizes):
        flat = torch.randn(sizes, generator=generator).to(dtype)
        if kind == "by tokens":
            return flat.transpose(1, 2).contiguous().transpose(1, 2)
        return strided(flat.view(-1, sizes[-1]), kind).unflatten(0, sizes[:-1])

    q, k, v = (
        drawn(batch, heads, tokens, channels),
        drawn(batch, groups, positions, channels),
        drawn(batch, groups, positions, values),
    )
    return Attention(q, k, v, mask_of(mask, (batch, heads, tokens, positions), dtype, generator), channels**-0.5)


def mask_of(kind, sizes, dtype, generator):
    """A mask that broadcasts to these sizes."""
    batch, _, tokens, positions = sizes
    at = torch.arange(positions)
    if kind == "none":
        return None
    if kind == "prefix":  # as of a static cache
        return at <= torch.randint(positions, (batch, 1, 1, 1), generator=generator) + torch.arange(tokens)[:, None]
    if kind == "some":
        return torch.rand((1, 1, tokens, positions), generator=generator) < 0.3
    if kind == "added":
        return torch.randn((positions,), generator=generator).where(at % 3 > 0, -math.inf).to(dtype)
    if kind == "of heads":  # as ALiBi
        return torch.randn(sizes, generator=generator)
    if kind == "nothing":
        return torch.zeros((1, 1, 1, 1), dtype=torch.bool)
    if kind == "one row of nothing":
        return (torch.arange(tokens)[:, None] > 0).expand(batch, 1, tokens, positions)
    return torch.randn((1, 1, tokens, 1), generator=generator)


@st.composite
def attentions(draw):
    """Operands of any sizes, dtypes, masks and strides that kernels take."""
    sizes = [
        draw(st.sampled_from(few)) for few in ((1, 2), (1, 2, 3), (1, 2, 3, 5), (1, 2, 3, 7, 16), (1, 2, 63, 64, 65, 97, 257))
    ]
    channels, values = (draw(st.sampled_from([1, 3, 8, 16, 31, 64, 72])) for _ in range(2))
    strides = draw(st.sampled_from(["contiguous", "by tokens", "sliced", "offset"]))
    facts = {"dtype": draw(st.sampled_from(DTYPES)), "mask": draw(st.sampled_from(MASKS)), "kind": strides}
    return attention(*sizes, channels, values=values, **facts)
