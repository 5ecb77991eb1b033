"""``rana::masked_gemv``, ``rana::router``, ``rana::masked_rows`` and fused forms on a GPU: which kernel, with which config.

In: Inductor IR of the operands, a few tokens. Out: IR of the result, or None where a kernel does not apply or is not expected to
win. The launch adds its partial sums up itself. Left to Inductor as a pointwise sum they were a kernel of their own as soon as
two slices of the result were read (q, k and v; gate and up: 1.8 us), and read by one multiprocessor where a norm followed
(9.6 us; Llama-2-7B shapes, H200, torch 2.11).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rana_fx.formats import bits_of, format_of, is_plain, shape_of
from rana_fx.kernels import autotune as tune
from rana_fx.kernels import cost
from rana_fx.kernels.triton.config import MAX_TOKENS, READ, TOKENS_AT_ONCE, Config, cdiv, configs, default_config
from rana_fx.passes.launch import COUNTERS, counters, fake, realized, starts_early, static, traced

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class _Product:
    """What a config is chosen by. stored, scale: the weight as it lies in memory, without its numbers. early: may start early."""

    v_TK: Any
    stored: torch.Tensor
    scale: torch.Tensor | None
    ranks: int
    columns: int
    tokens: int
    density: float
    activation: str | None
    early: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.ranks, self.columns, self.tokens

    @property
    def bits(self) -> int:
        return bits_of(self.stored)


def masked_product(
    v_TK: Any,
    tau: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    density: float,
    *,
    residual_TN: Any = None,
    activation: str | None = None,
) -> Any:
    """(T, N) in v's dtype, (T, N / 2) with an activation; None where the dense product is expected to be faster or the kernel
    does not apply.
    """
    from rana_fx.kernels.triton.masked_gemv import masked_gemv

    if tokens_of(v_TK) is None or not static(v_TK, tau, weight, scale):
        return None
    operands = realized(v_TK, tau, weight, scale)
    early = starts_early(operands[0], operands[1:4])
    config = _config(_product(operands[0], operands[2], operands[3], density, activation, early=early))
    if config is None:
        return None
    operands += [*realized(bias, residual_TN), counters(v_TK.get_device())]

    def launch(v: Any, tau: Any, weight: Any, scale: Any, bias: Any, residual: Any, zeros: Any) -> Any:
        finish: dict[str, Any] = dict(residual=residual, activation=activation, counters=zeros)
        return masked_gemv(v, tau, weight, bias, scale, config=config, traced=True, pdl=early, **finish)

    return traced(launch, operands, key=("masked_gemv", config, activation, early))


def masked_parts(v_TK: Any, taus: Sequence[Any], weights: Sequence[Any], biases: Sequence[Any], density: float) -> Any:
    """(T, sum of N) in v's dtype, or None where the kernel does not apply or is not expected to win."""
    from rana_fx.kernels.triton.masked_gemv_concat import masked_gemv_parts

    tokens, count = tokens_of(v_TK), len(weights)
    if tokens is None or not static(v_TK, *taus, *weights, *biases):
        return None
    operands = realized(v_TK, *taus, *weights, *biases)
    stored = [fake(weight) for weight in operands[1 + count : 1 + 2 * count]]
    sizes = [tuple(weight.shape) for weight in stored if weight is not None and weight.stride(1) == 1]
    if len(sizes) < count:
        return None
    ranks, columns = sizes[0][0], sum(size for _, size in sizes)
    whole = torch.empty((ranks, columns), dtype=weights[0].get_dtype(), device="meta")
    early = starts_early(operands[0], operands[1 : 1 + 2 * count])
    config = _config(_Product(v_TK, whole, None, ranks, columns, tokens, density, None, early))
    if config is None:
        return None
    operands.append(counters(v_TK.get_device()))

    def launch(v: Any, *rest: Any) -> Any:
        parts = rest[:count], rest[count : 2 * count], rest[2 * count : -1]
        return masked_gemv_parts(v, *parts, config=config, counters=rest[-1], traced=True, pdl=early)

    return traced(launch, operands, key=("masked_gemv_parts", config, count, len(biases), early))


def router_product(x_TI: Any, weight: Any, scale: Any, gain: Any = None, eps: float | None = None, offset: float = 0.0) -> Any:
    """(T, R) in x's dtype, or None where the kernel does not apply. With ``eps``, of x after its root-mean-square norm."""
    from rana_fx.kernels.triton.router import router

    tokens = tokens_of(x_TI)
    # above a few tokens a floating weight is read by a matrix product as fast, and multiplied faster
    if tokens is None or (is_plain(weight.get_dtype()) and tokens > TOKENS_AT_ONCE) or not static(x_TI, weight, scale):
        return None
    if format_of(weight.get_dtype()) not in READ:
        return None
    operands = realized(x_TI, weight, scale, gain)
    early = starts_early(operands[0], operands[1:])

    def launch(x: Any, weight: Any, scale: Any, gain: Any) -> Any:
        return router(x, weight, scale, gain=gain, eps=eps, offset=offset, traced=True, pdl=early)

    return traced(launch, operands, key=("router", eps, offset, early))


def rows_product(x_TK: Any, a_TN: Any, weight: Any, bias: Any, density: float) -> Any:
    """(T, N) of ``masked_rows`` in x's dtype, or None where the kernel does not apply or is not expected to win."""
    from rana_fx.kernels.triton.masked_rows import masked_rows

    tokens = tokens_of(x_TK)
    if tokens is None or not static(x_TK, a_TN, weight):
        return None
    (rows,) = realized(weight)
    stored = fake(rows)
    assert stored is not None
    columns, width = stored.shape
    device, bits = cost.nearest(x_TK.get_device()), bits_of(stored)
    # what a skipped row would be is no stretch of memory, or masks cover too much
    if stored.stride(1) != 1 or not cost.prefers_rows(columns, width, tokens, density, device, bits=bits):
        return None
    operands = [*realized(x_TK, a_TN), rows, *realized(bias)]
    # it reads nothing before the kernel that made a is done
    early = starts_early(operands[1], ())

    def launch(x: Any, a: Any, weight: Any, bias: Any) -> Any:
        return masked_rows(x, a, weight, bias, traced=True, pdl=early)

    return traced(launch, operands, key=("masked_rows", early))


def tokens_of(x_TK: Any) -> int | None:
    """The number of tokens on a GPU, where it is known and small enough for the kernels."""
    tokens = x_TK.get_size()[0]
    few = isinstance(tokens, (int, sympy.Integer)) and 1 <= int(tokens) <= MAX_TOKENS
    return int(tokens) if few and x_TK.get_device().type == "cuda" and x_TK.get_dtype() in _DTYPES else None


def _config(product: _Product | None) -> Config | None:
    """How to launch, or None: not applicable, or the dense product is expected to be faster."""
    if product is None:
        return None
    shape, device = product.shape, cost.nearest(product.v_TK.get_device())
    if not cost.prefers_masked(*shape, product.density, device, bits=product.bits):
        return None
    if torch._inductor.config.max_autotune:
        config = _fastest(product, configs(*shape, product.density, device.sm_count, bits=product.bits))
    else:
        config = default_config(*shape, product.density, device.sm_count, bits=product.bits)
    # with room for two parts that end within a block
    if (cdiv(product.columns, min(config.block_n, 64)) + 2) * cdiv(product.tokens, TOKENS_AT_ONCE) > COUNTERS:
        return None
    return config


def _product(v_TK: Any, weight: Any, scale: Any, density: float, activation: str | None, *, early: bool) -> _Product | None:
    """None where no kernel reads the format, or a skipped row would not be a skipped stretch of memory."""
    tokens, stored = tokens_of(v_TK), fake(weight)
    if tokens is None or stored is None or format_of(stored) not in READ or (is_plain(stored) and stored.stride(1) != 1):
        return None
    ranks, columns = shape_of(stored, fake(scale))
    return _Product(v_TK, stored, fake(scale), ranks, columns, tokens, density, activation, early)


def _fastest(product: _Product, choices: list[Config]) -> Config:
    """Measured once for all shapes nearly alike (kernels/autotune.py)."""
    from rana_fx.kernels.triton.masked_gemv import masked_gemv

    def measure(config: Config) -> float:
        launch = functools.partial(
            masked_gemv, v, tau, scale=scales, activation=product.activation, config=config, pdl=product.early
        )
        return tune.microseconds([functools.partial(launch, weight) for weight in weights])

    stored, scale, dtype, device = product.stored, product.scale, product.v_TK.get_dtype(), product.v_TK.get_device()
    key = tune.bucket(*product.shape, product.density, product.bits, dtype)
    how = f"{product.activation or 'linear'}{' early' if product.early else ''}"
    with unset_fake_temporarily():
        v = torch.randn(product.tokens, product.ranks, device=device).to(dtype)
        level = v.float().square().flatten().quantile(1 - min(max(product.density, 0.0), 1.0))
        tau = level.expand(product.ranks).contiguous()
        weights = [
            torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype, device=device).fill_(1)
            for _ in range(tune.copies_of(product.ranks * product.columns * product.bits / 8))
        ]
        scales = None if scale is None else torch.ones(scale.shape, dtype=scale.dtype, device=device)
        return tune.fastest(f"masked_gemv {key} {how}", choices, measure)
