"""Operands for kernel tests, their fp64 result, and a bound on the error of a kernel.

The bound on the RMS error has two terms, each relative to its cause: rounding the result (half an eps of its dtype,
of the result; a whole one where Triton's interpreter, which truncates to bfloat16, stands in for a GPU, which rounds) and fp32
products and sums in any order (4 eps * sqrt(log2 K + 1), of the sum of magnitudes).
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import strategies as st

from rana_fx.formats import pack, unpack

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 2, 3, 7, 16, 31, 64, 97, 130]
THRESHOLDS = {"zero": 0.0, "tiny": 1e-38, "some": 0.5, "most": 2.5, "huge": 1e30, "inf": math.inf}


@dataclasses.dataclass(frozen=True)
class Product:
    """Operands of one masked matmul. v (T, K), tau (K,), weight as stored, bias (N,) or None."""

    v: torch.Tensor
    tau: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def operands(self):
        return self.v, self.tau, self.weight, self.bias, self.scale

    def to(self, device):
        tensors = {name: value if value is None else moved(value, device) for name, value in vars(self).items()}
        return dataclasses.replace(self, **tensors)

    def sums(self):
        """The masked matmul and the sum of the magnitudes of its terms, fp64."""
        kept = self.v.float().square() >= self.tau
        v = torch.where(kept, self.v, self.v.new_zeros(())).double()
        w = unpack(self.weight, self.scale, torch.float64)
        bias = torch.zeros((), dtype=torch.float64, device=v.device) if self.bias is None else self.bias.double()
        return v @ w + bias, v.abs() @ w.abs() + bias.abs()

    def check(self, y, residual=0.0):
        """Assert that y is the masked matmul (plus a residual) in v's dtype, within the bound."""
        exact, magnitude = self.sums()
        more = torch.as_tensor(residual, dtype=torch.float64)
        assert y.dtype == self.v.dtype
        assert_close("y", y, exact + more, magnitude + more.abs(), terms=self.v.shape[-1])

    def check_each(self, y):
        """``check`` for the reference, whose sums and dequantised weights are in v's dtype."""
        assert y.dtype == self.v.dtype
        assert_each_close("y", y, *self.sums(), terms=self.v.shape[-1])

    def check_gated(self, y, activation):
        """Assert that y is activation(first half) * second half of the masked matmul.

        Slopes of the known activations are at most 1.13; the error of their arithmetic is proportional to their argument.
        """
        (first, second), magnitudes = (sums.chunk(2, -1) for sums in self.sums())
        acted = activation(first)
        assert y.dtype == self.v.dtype
        magnitude = 1.13 * magnitudes[0] * second.abs() + acted.abs() * magnitudes[1] + (first * second).abs()
        assert_close("y", y, acted * second, magnitude, terms=self.v.shape[-1])


@dataclasses.dataclass(frozen=True)
class Rows:
    """Operands of masked_rows. x (T, K), a (T, N), weight (N, K), bias (N,) or None."""

    x: torch.Tensor
    a: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def to(self, device):
        return Rows(*(value if value is None else moved(value, device) for value in vars(self).values()))

    @property
    def operands(self):
        return self.x, self.a, self.weight, self.bias

    @property
    def kept(self):
        """Rows of weight that some token keeps."""
        return (self.a != 0).any(0)

    def poisoned(self):
        """The same with NaN in all rows that no token keeps."""
        weight = self.weight.clone(memory_format=torch.preserve_format)
        weight[~self.kept] = math.nan
        return dataclasses.replace(self, weight=weight)

    def sums(self):
        """The result and the sum of the magnitudes of its terms, fp64."""
        w, zero = self.weight.double(), torch.zeros((), dtype=torch.float64, device=self.x.device)
        bias, a = zero if self.bias is None else self.bias.double(), self.a.double()
        exact = torch.where(a != 0, a * (self.x.double() @ w.t() + bias), zero)
        return exact, torch.where(a != 0, a.abs() * (self.x.double().abs() @ w.abs().t() + bias.abs()), zero)

    def check(self, h):
        """Assert that h is the result in x's dtype, within the bound, and zero where a is zero."""
        self._check(assert_close, h)

    def check_each(self, h):
        """``check`` for the reference, whose sums are in x's dtype."""
        self._check(assert_each_close, h)

    def _check(self, compare, h):
        assert h.dtype == self.x.dtype
        assert bool((h[self.a == 0] == 0).all())
        compare("h", h, *self.sums(), terms=self.x.shape[-1])


def assert_close(name, got, exact, magnitude, *, terms):
    eps, rounded = torch.finfo(torch.float32).eps, torch.finfo(got.dtype)
    step = rounded.eps if got.dtype == torch.bfloat16 and got.device.type == "cpu" else rounded.eps / 2
    error = (got.double() - exact).norm().item()
    # subnormal numbers have a constant step
    rounding = step * exact.norm().item() + rounded.tiny * math.sqrt(exact.numel())
    bound = rounding + 4 * eps * math.sqrt(math.log2(terms) + 1) * magnitude.norm().item()
    assert got.shape == exact.shape
    assert error <= bound, f"{name}: error {error:.3e} exceeds {bound:.3e}"


def assert_each_close(name, got, exact, magnitude, *, terms):
    """Element by element, for operands, sums and results that are rounded to got's dtype."""
    rounded = torch.finfo(got.dtype)
    bound = 4 * rounded.eps * math.sqrt(math.log2(terms) + 1) * magnitude + rounded.tiny
    assert got.shape == exact.shape
    excess = ((got.double() - exact).abs() - bound).max().item()
    assert excess <= 0, f"{name}: an error exceeds its bound by {excess:.3e}"


def strided(values, kind):
    """The same values with other strides."""
    if kind == "transposed":
        return values.t().contiguous().t()
    if kind == "sliced":
        return torch.cat([values, values], -1)[..., : values.shape[-1]]
    if kind == "offset":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    return values


STRIDES = st.sampled_from(["contiguous", "transposed", "sliced", "offset"])


def every_number(weight, scale, generator):
    """In 4 bits all sixteen numbers under steps of both signs, as recipes round (``pack`` leaves both out)."""
    if weight.dtype == torch.uint8:
        weight = torch.randint(0, 256, weight.shape, dtype=torch.uint8, generator=generator)
        scale = scale * (torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1)
    return weight, scale


@st.composite
def products(draw, *, bits=16, tokens=(1, 2, 3, 4, 5, 16), halves=False):
    """Operands of masked matmuls. With halves, each half of N has whole words and groups."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    t, k = draw(st.sampled_from(tokens)), draw(st.sampled_from(SIZES))
    n = draw(st.sampled_from([size for size in SIZES if bits != 4 or size % 2 == 0]))
    if halves:  # in 8 bits four times a smaller size: Triton's interpreter takes time for each block of columns
        n = {16: 2 * n, 8: 8 * min(n, 31), 4: 512}[bits]
    dtype = draw(st.sampled_from(DTYPES))
    v = strided(torch.randn(t, k, generator=generator).to(dtype), draw(STRIDES))
    weight, scale = torch.randn(k, n, generator=generator).to(dtype), None
    if bits < 16:
        weight, scale = pack(weight, bits, draw(st.sampled_from([64, 128])))
        weight, scale = every_number(weight, scale, generator)
        scale = scale if scale.dim() == 1 else strided(scale, draw(STRIDES))
    weight = strided(weight, draw(STRIDES))
    tau = torch.rand(k, generator=generator) * THRESHOLDS[draw(st.sampled_from(sorted(THRESHOLDS)))]
    tau = tau.nan_to_num(nan=0.0, posinf=math.inf)
    if draw(st.booleans()):
        tau = tau[:1].expand(k)
    bias = torch.randn(n, generator=generator).to(dtype) if draw(st.booleans()) else None
    return Product(v, tau, weight, scale, bias)


def product_of(tokens, ranks, outputs, dtype, *, bits=16, density=0.5, seed=0):
    """Operands of a masked matmul; a threshold per rank around the quantile that gives the density."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(tokens, ranks, generator=generator).to(dtype)
    cut = {0.0: math.inf, 1.0: 0.0}.get(density, float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - density / 2))) ** 2)
    tau = (torch.full((ranks,), cut) * (0.5 + torch.rand(ranks, generator=generator))).nan_to_num(nan=0.0, posinf=math.inf)
    weight = (torch.randn(ranks, outputs, generator=generator) / math.sqrt(ranks)).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    weight, scale = (weight, None) if bits == 16 else every_number(*pack(weight, bits), generator)
    return Product(v, tau, weight, scale, bias)


def masked_by(density, *shape, generator):
    """Random values; about that fraction is not zero."""
    a = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, a, 0.0)


@st.composite
def row_products(draw, *, tokens=(1, 2, 3, 4, 5, 16), rows=SIZES):
    """Operands of masked_rows with NaN in every row of the weight that no token keeps."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    t, n, k = draw(st.sampled_from(tokens)), draw(st.sampled_from(rows)), draw(st.sampled_from(SIZES))
    dtype = draw(st.sampled_from(DTYPES))
    x = strided(torch.randn(t, k, generator=generator).to(dtype), draw(STRIDES))
    a = masked_by(draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), t, n, generator=generator)
    weight = strided((torch.randn(n, k, generator=generator) / k**0.5).to(dtype), draw(STRIDES))
    bias = torch.randn(n, generator=generator).to(dtype) if draw(st.booleans()) else None
    return Rows(x, strided(a.to(dtype), draw(STRIDES)), weight, bias)


def kernels_run_on(device):
    """Skips where Triton was imported to compile and the tensors are not on a GPU."""
    gather = pytest.importorskip("rana_fx.kernels.triton.compaction")
    if device.type == "cpu" and not gather.INTERPRETED:
        pytest.skip("compiled kernels need a GPU")


def moved(tensor, device):
    """The same strides on another device."""
    if tensor.device == device:
        return tensor
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return torch.as_strided(torch.as_strided(tensor, (span,), (1,)).to(device), tensor.shape, tensor.stride())
