"""One adapter: what replaces one linear, or several stacked over one input.

Every kind is the same computation, y = c + sum over kept k of v_k Wt[k, :], kept where v_k^2 >= tau_k:

    rank     v = B x, tau = t (one value), Wt = A^T         static   the same with tau = 0 and fewer ranks
    neuron   v = x, tau_k = t^2 / |W_:,k|^2, Wt = W^T       gated    v = h, where act(gate) is zeroed below t (CATS)

Only factors that are not the model's own weights are stored; a neuron adapter multiplies by the original weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["rank", "static", "neuron", "gated"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Adapter of ``sites`` (stacked in this order).

    Args:
        router: B, (ranks, in), or None when v = x.
        weight: Wt = A^T, (ranks, out), or None for the model's own W^T.
        tau: thresholds on v^2, fp32, (ranks,). For ``gated``: one value, the threshold on |act(gate)|.
        bias: c, (out,), or None.
        kept: expected number of kept ranks per token, over the calibration tokens.
        flops: expected multiply-adds per token, router included. dense_flops: of the layers replaced.
        bytes: expected weight bytes read per token. dense_bytes: of the layers replaced.
        error: relative squared output error over the calibration tokens, where it was measured.
        also: a further site whose cost the adapter changes (``gated``: the up projection whose rows are skipped).
    """

    name: str
    kind: Kind
    sites: tuple[str, ...]
    ranks: int
    kept: float
    tau: Tensor
    router: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    flops: float = 0.0
    dense_flops: float = 0.0
    bytes: float = 0.0
    dense_bytes: float = 0.0
    error: float | None = None
    gate: str | None = None
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.sites and self.ranks > 0 and 0 <= self.kept <= self.ranks, self.name
        assert self.tau.dtype == torch.float32 and self.tau.shape in ((self.ranks,), (1,)), self.name
        assert (self.router is None) == (self.weight is None), self.name

    @property
    def density(self) -> float:
        """Expected fraction of ranks kept."""
        return self.kept / self.ranks

    def cost(self, metric: str, kept: float | None = None) -> float:
        """Cost per token in ``metric`` when ``kept`` ranks are kept (default: as expected)."""
        expected = self.flops if metric == "flops" else self.bytes
        if kept is None or self.kept == 0:
            return expected
        dense = self.dense_flops if metric == "flops" else self.dense_bytes
        if self.kind == "neuron":
            return dense * kept / self.ranks
        if self.kind == "gated":
            return dense * kept / self.ranks
        fixed = self.fixed(metric)
        return fixed + (expected - fixed) * kept / self.kept

    def fixed(self, metric: str) -> float:
        """The part of the cost that does not depend on the mask: the router's."""
        if self.router is None:
            return 0.0
        uses = self.dense_flops / (self.weight.shape[1] * self.router.shape[1]) if self.weight is not None else 1.0
        return self.router.numel() * uses * (1 if metric == "flops" else self.router.element_size())

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored."""
        named = {"tau": self.tau, "router": self.router, "weight": self.weight, "bias": self.bias}
        return {key: value for key, value in named.items() if value is not None}

    def to(self, dtype: torch.dtype) -> Adapter:
        """Factors in the model's dtype; thresholds stay fp32."""

        def cast(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(dtype).contiguous()

        return replace(self, router=cast(self.router), weight=cast(self.weight), bias=cast(self.bias))

    def on(self, device: torch.device | str) -> Adapter:
        """The same on another device."""
        moved: Any = {key: value.to(device) for key, value in self.tensors().items()}
        return replace(self, **moved)
