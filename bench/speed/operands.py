"""Random operands of one matmul in rotating buffers, its fp64 result, and a ``Trial`` for every implementation.

In: a shape, tokens, bits, number of buffers. Out: ``Trial``s, each a list of calls (one per buffer), the exact result of the
first call, and the sum of magnitudes for its error bound. Imports Triton, so TRITON_INTERPRET must be set before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from bench.speed import baseline_kernels, rival_matmuls
from bench.speed.shapes import Shape
from rana_fx.formats import pack, unpack
from rana_fx.kernels import reference
from rana_fx.kernels.cost import weight_bytes
from rana_fx.kernels.cuda import masked_gemv as tensor_cores
from rana_fx.kernels.cuda import router as tensor_core_router
from rana_fx.kernels.cuda.config import configs as tensor_core_configs
from rana_fx.kernels.cuda.config import default_config as tensor_core_config
from rana_fx.kernels.cuda.router_config import configs as tensor_core_router_configs
from rana_fx.kernels.triton import masked_gemv, router
from rana_fx.kernels.triton.config import Launch, configs, default_config


@dataclasses.dataclass(frozen=True)
class Trial:
    """One implementation of a matmul. terms: numbers added per output; roundings: roundings to its dtype per output.

    stored: bytes of its weight, where it has a format of its own.
    """

    calls: list[Callable[[], Tensor]]
    exact: Tensor
    magnitude: Tensor
    terms: int
    config: dict[str, Any] | None = None
    roundings: int = 1
    stored: int | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands, one per buffer: xs (T, K); plain (K, N), for a router (N, K), both bf16; stored: (values, scale) in ``bits``."""

    shape: Shape
    bits: int
    xs: list[Tensor]
    plain: list[Tensor]
    stored: list[tuple[Tensor, Tensor | None]]

    @property
    def dense_bytes(self) -> float:
        """Bytes of the bf16 weight."""
        return self.shape.K * self.shape.N * 2.0

    def bytes_read(self, share: int) -> float:
        """Weight bytes of the rows that some token of the first buffer keeps. ``share``: per cent masked."""
        if self.shape.op == "router":
            return weight_bytes(self.shape.N, self.shape.K, self.bits)
        rows = int(reference.kept(self.xs[0], self.tau(share)).any(0).sum())
        return weight_bytes(rows, self.shape.N, self.bits)

    def tau(self, share: int) -> Tensor:
        """(K,): the threshold that masks ``share`` per cent of all values."""
        squares = torch.cat(self.xs).float().square().flatten()
        level = squares.sort().values[min(int(squares.numel() * share / 100), squares.numel() - 1)] if share else 0.0
        return torch.full((self.shape.K,), float(level), device=self.xs[0].device)

    def dense_trial(self, name: str) -> Trial:
        """F.linear by cuBLAS or Inductor with weights (N, K); for a gated matmul including the activation."""
        function = baseline_kernels.silu_of_linear if self.shape.op == "gated_gemv" else baseline_kernels.cublas_linear
        dense = baseline_kernels.by_inductor(function, tuned=True) if name == "inductor" else function
        weights = [w if self.shape.op == "router" else w.t().contiguous() for w in self.plain]
        exact, magnitude = self._exact(self.xs[0], weights[0].t())
        calls = [functools.partial(dense, x, w) for x, w in zip(self.xs, weights, strict=True)]
        # cuBLAS may add split-K partial sums in 16 bits
        return Trial(calls, exact, magnitude, self.shape.K, roundings=4 if self.shape.op == "gated_gemv" else 2)

    def rival_trial(self, name: str) -> Trial:
        """A 4-bit matmul of another library, compared with its own weight; the activation of a gated matmul is compiled."""
        make, tokens = rival_matmuls.MATMULS[name], self.xs[0].shape[0]
        weights = [w if self.shape.op == "router" else w.t().contiguous() for w in self.plain]
        made = [make(weight, tokens) for weight in weights]
        exact, magnitude = self._exact(self.xs[0], made[0].weight.t())
        calls: list[Callable[[], Tensor]] = [functools.partial(one.call, x) for x, one in zip(self.xs, made, strict=True)]
        roundings = made[0].roundings
        if self.shape.op == "gated_gemv":
            activation = baseline_kernels.by_inductor(baseline_kernels.silu_of_halves, tuned=False)
            calls = [lambda call=call: activation(call()) for call in calls]
            roundings = 2 * roundings + 1  # of both factors and of the product
        return Trial(calls, exact, magnitude, self.shape.K, roundings=roundings, stored=made[0].stored)

    def kernel_trials(self, share: int, tuned: Collection[str]) -> dict[str, list[Trial]]:
        """Trials of this package's kernels by name; of those in ``tuned`` one per candidate config, the default first."""
        tokens = self.xs[0].shape[0]
        if self.shape.op == "router":
            return self._router_trials(tuned)
        tau, density = self.tau(share), 1 - share / 100
        kept = self._kept(self.xs[0], tau)
        exact, magnitude = self._exact(kept, unpack(*self.stored[0], torch.float64))
        candidates = [default_config(self.shape.K, self.shape.N, tokens, density, bits=self.bits)]
        candidates += configs(self.shape.K, self.shape.N, tokens, density, bits=self.bits) if "masked" in tuned else []
        activation = "silu" if self.shape.op == "gated_gemv" else None
        found = {"masked": [self._masked(config, tau, activation, exact, magnitude) for config in candidates]}
        if self.xs[0].is_cuda and tensor_cores.refusal(self.xs[0], tau, *self.stored[0], activation) is None:
            found["tensor_cores"] = self._on_tensor_cores(tau, activation, exact, magnitude, "tensor_cores" in tuned)
        return found

    def published_trials(self, share: int) -> dict[str, list[Trial]]:
        """Trials of the published kernel, one per choice of block sizes."""
        tau = self.tau(share)
        exact, magnitude = self._exact(self._kept(self.xs[0], tau), self.plain[0].double())
        trials = []
        for choice in baseline_kernels.PUBLISHED:
            calls = [
                functools.partial(baseline_kernels.published, x, tau, w, choice) for x, w in zip(self.xs, self.plain, strict=True)
            ]
            names = dict(zip(("block_k", "block_n", "warps"), choice, strict=True))
            trials.append(Trial(calls, exact, magnitude, self.shape.K, names))
        return {"published": trials}

    def fallback_trials(self, shares: list[int]) -> dict[int, Trial]:
        """Trials of the dense fallback by masked per cent; one compilation."""
        cuda = self.xs[0].is_cuda
        function = baseline_kernels.by_inductor(reference.masked_gemv, tuned=False) if cuda else reference.masked_gemv
        trials = {}
        for share in shares:
            tau = self.tau(share)
            exact, magnitude = self._exact(self._kept(self.xs[0], tau), self.plain[0].double())
            calls = [functools.partial(function, x, tau, w) for x, w in zip(self.xs, self.plain, strict=True)]
            trials[share] = Trial(calls, exact, magnitude, self.shape.K, roundings=2)
        return trials

    def _masked(self, config: Any, tau: Tensor, activation: str | None, exact: Tensor, magnitude: Tensor) -> Trial:
        def call(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
            return masked_gemv.masked_gemv(
                x, tau, weight, None, scale, activation=activation, config=config, how=Launch(pdl=_early_launch(x))
            )

        calls = [functools.partial(call, x, *stored) for x, stored in zip(self.xs, self.stored, strict=True)]
        return Trial(calls, exact, magnitude, self.shape.K, dataclasses.asdict(config))

    def _on_tensor_cores(self, tau: Tensor, activation: str | None, exact: Tensor, magnitude: Tensor, tune: bool) -> list[Trial]:
        """Trials of the kernel on tensor cores; with ``tune`` one per candidate config."""
        tokens, gated = self.xs[0].shape[0], activation is not None
        choose = tensor_core_configs if tune else lambda *sizes, **kind: [tensor_core_config(*sizes, **kind)]
        candidates = choose(self.shape.K, self.shape.N, tokens, bits=self.bits, gated=gated)
        trials = []
        for config in candidates:
            call = functools.partial(
                tensor_cores.masked_gemv, activation=activation, config=config, early=_early_launch(self.xs[0])
            )
            calls = [functools.partial(call, x, tau, w, None, scale) for x, (w, scale) in zip(self.xs, self.stored, strict=True)]
            trials.append(Trial(calls, exact, magnitude, self.shape.K, dataclasses.asdict(config)))
        return trials

    def _router_trials(self, tuned: Collection[str]) -> dict[str, list[Trial]]:
        """Trials of the routers, alone and with the norm in front (default config)."""
        sizes, early = (self.shape.N, self.shape.K, self.xs[0].shape[0]), _early_launch(self.xs[0])
        gain = torch.linspace(0.5, 1.5, self.shape.K, device=self.xs[0].device).bfloat16()
        norm = dict(gain=gain, eps=1e-5)
        candidates: list[Any] = [router.default_config(*sizes, bits=self.bits, pdl=early)]
        candidates += router.configs(*sizes[:2], bits=self.bits) if "router" in tuned else []
        by_triton = functools.partial(router.router, how=Launch(pdl=early))
        found = {
            "router": [self._routed(by_triton, config) for config in candidates],
            "router+norm": [self._routed(by_triton, candidates[0], norm)],
        }
        if self.xs[0].is_cuda and tensor_core_router.refusal(self.xs[0], *self.stored[0]) is None:
            choices = tensor_core_router_configs(*sizes, bits=self.bits)
            tried = choices if "tensor_cores" in tuned else choices[:1]
            launch = functools.partial(tensor_core_router.router, early=early)
            found["tensor_cores"] = [self._routed(launch, config) for config in tried]
            found["tensor_cores+norm"] = [self._routed(launch, choices[0], norm, roundings=2)]
        return found

    def _routed(self, launch: Any, config: Any, norm: dict[str, Any] | None = None, *, roundings: int = 1) -> Trial:
        x, norm = self.xs[0].double(), norm or {}
        if norm:
            x = x * (x.square().mean(-1, keepdim=True) + norm["eps"]).rsqrt() * norm["gain"].double()
        exact, magnitude = self._exact(x, unpack(*self.stored[0], torch.float64).t())
        calls = [
            functools.partial(launch, x, *stored, config=config, **norm) for x, stored in zip(self.xs, self.stored, strict=True)
        ]
        return Trial(calls, exact, magnitude, self.shape.K, dataclasses.asdict(config), roundings)

    def _kept(self, x: Tensor, tau: Tensor) -> Tensor:
        return torch.where(reference.kept(x, tau), x, x.new_zeros(()))

    def _exact(self, x: Tensor, weight_KN: Tensor) -> tuple[Tensor, Tensor]:
        """The result in fp64, and the sum of the magnitudes of its terms."""
        y, magnitude = x.double() @ weight_KN.double(), x.double().abs() @ weight_KN.double().abs()
        if self.shape.op != "gated_gemv":
            return y, magnitude
        (gate, up), (a, b) = y.chunk(2, -1), magnitude.chunk(2, -1)
        # silu has a slope below 1.1 and |silu(x)| <= |x|
        return torch.nn.functional.silu(gate) * up, 1.1 * (a * up.abs() + b * gate.abs())


def _early_launch(x: Tensor) -> bool:
    """Whether a launch starts before the previous one is done (PDL), as in compiled graphs."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def make_case(shape: Shape, tokens: int, bits: int, buffers: int, device: torch.device) -> Case:
    """Gaussian operands with a fixed seed, weights scaled so that outputs have variance one."""
    generator = torch.Generator(device=device).manual_seed(0)
    size = (shape.N, shape.K) if shape.op == "router" else (shape.K, shape.N)
    xs, plain, stored = [], [], []
    scale_dtype = torch.bfloat16 if bits == 4 else torch.float32
    for _ in range(buffers):
        xs.append(torch.randn(tokens, shape.K, generator=generator, device=device).bfloat16())
        plain.append((torch.randn(size, generator=generator, device=device) / shape.K**0.5).bfloat16())
        stored.append((plain[-1], None) if bits == 16 else pack(plain[-1], bits, 64, scale_dtype))
    return Case(shape, bits, xs, plain, stored)
