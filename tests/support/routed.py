"""Operands of a router on tensor cores, with their fp64 result and a bound on the error of a kernel."""

from __future__ import annotations

import dataclasses
import math

import torch

from rana_fx.formats import pack, unpack

F32, BF16 = torch.float32, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Routed:
    """Operands of one call. eps None: without a norm."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None
    gain: torch.Tensor | None = None
    eps: float | None = None
    offset: float = 0.0

    @property
    def operands(self):
        return self.x, self.weight, self.scale

    @property
    def norm(self):
        return dict(gain=self.gain, eps=self.eps, offset=self.offset)

    def to(self, device):
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()}
        return Routed(**moved)

    def terms(self):
        """x, normed, and the weight in fp64."""
        x = self.x.double()
        if self.eps is not None:
            x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        if self.gain is not None:
            x = x * (self.gain.double() + self.offset)
        return x, unpack(self.weight, self.scale, torch.float64)

    def check(self, z):
        """z within the bound on the RMS error: rounding z; fp32 sums in any order (twice with a norm, whose sum of squares errs
        as the product does); with a gain, rounding x * gain, half an eps of each term at most. These are independent: three
        times the root of the sum of their squares is beyond five standard deviations.
        """
        x, w = self.terms()
        exact, magnitude = x @ w.t(), x.abs() @ w.abs().t()
        half = torch.finfo(z.dtype).eps / 2
        sums = 4 * torch.finfo(F32).eps * math.sqrt(math.log2(x.shape[-1]) + 1) * magnitude.norm().item()
        bound = (
            half * exact.norm().item() + sums * (1 if self.eps is None else 2) + torch.finfo(z.dtype).tiny * exact.numel() ** 0.5
        )
        if self.gain is not None:
            bound += 3 * half * (x.square() @ w.square().t()).sum().sqrt().item()
        error = (z.double() - exact).norm().item()
        assert z.dtype == self.x.dtype and z.shape == exact.shape
        assert error <= bound, f"error {error:.3e} exceeds {bound:.3e}"


def routed(
    tokens, ranks, columns, bits, *, dtype=BF16, group=64, scale_dtype=BF16, gain=None, eps=None, offset=0.0, seed=0, apart=0
):
    """Gaussian operands; ``apart``: so many bytes between rows of the weight. gain: its dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    weight, scale = torch.randn(ranks, columns, generator=generator).to(dtype), None
    if bits < 16:
        weight, scale = pack(weight, bits, group, scale_dtype)
    if bits == 4:  # all sixteen numbers under steps of both signs, as recipes round
        weight = torch.randint(0, 256, weight.shape, dtype=torch.uint8, generator=generator)
        scale = scale * (torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1)
    if apart:
        memory = torch.zeros(ranks, weight.shape[1] + apart // weight.element_size(), dtype=weight.dtype)
        weight = memory[:, : weight.shape[1]].copy_(weight)
    gains = None if gain is None else torch.randn(columns, generator=generator).to(gain)
    return Routed(x, weight, scale, gains, eps, offset)
