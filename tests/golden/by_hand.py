"""An fp64 reference of the golden model with every adapter, which also moves thresholds away from all values.

An output of a masked matmul is discontinuous where rounding moves a value across its threshold. A golden output must not depend
on that: ``settle`` moves each threshold to the middle of the widest gap between the values that are compared with it on the fixed
tokens, and ``margin`` is the smallest distance of a value to its threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from rana_fx.adapter import Adapter
from rana_fx.formats import unpack
from tests.golden.model import Golden, ids, load


def matrix_of(model: Golden, site: str) -> torch.Tensor:
    """(out, in), for any storage."""
    owner = model.get_parameter(site) if site in dict(model.named_parameters()) else model.get_submodule(site).weight
    return (owner.t() if site in ("blocks.0.v", "blocks.2.up") else owner).detach()


def bias_of(model: Golden, site: str) -> torch.Tensor | None:
    if site == "blocks.2.up":
        return model.blocks[2].up_bias.detach()
    found = dict(model.named_parameters()).get(f"{site}.bias")
    return None if found is None else found.detach()


@dataclass
class Hand:
    """In: adapters and the model's dtype. ``adapters``: by first site; after ``run(settle=True)`` with moved thresholds."""

    adapters: dict[str, Adapter]
    dtype: torch.dtype
    settle: bool = False
    margin: float = float("inf")  # smallest distance of a number to its threshold, over the root mean square of the numbers
    gates: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The logits in fp64."""
        model = load(self.dtype).double()
        for index, block in enumerate(model.blocks):
            block.product = partial(self._product, model, f"blocks.{index}.")  # type: ignore[method-assign]
        with torch.no_grad():
            return model(**(batch or ids())).logits

    def _product(self, model: Golden, block: str, name: str, x: torch.Tensor) -> torch.Tensor:
        found = self._linear(model, block + name, x)
        if name == "gate":
            self.gates[block + name] = F.silu(found)
        return found

    def _linear(self, model: Golden, site: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = matrix_of(model, site), bias_of(model, site)
        dense = F.linear(x, weight, bias)
        first = next((key for key, adapter in self.adapters.items() if site in adapter.sites), None)
        if first is None:
            return dense
        if self.settle and site == first:
            self._settle(first, x, dense, weight)
        adapter = self.adapters[first]
        y = self._output(adapter, x, weight)
        if adapter.bias is not None:
            y = y + adapter.bias.double()
        elif adapter.weight is None and bias is not None:
            y = y + bias
        if adapter.exact_tau is not None:
            y = torch.where(self._kept(y, adapter.exact_tau), dense, y)
        sizes = [len(matrix_of(model, other)) for other in adapter.sites]
        return y.split(sizes, -1)[adapter.sites.index(site)] if y.shape[-1] == sum(sizes) else y

    def _kept(self, values: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        rms = values.square().mean().sqrt()
        finite = tau.isfinite() & (tau != 0)
        if finite.any():
            self.margin = min(
                self.margin, float(((values - tau.double())[..., finite if len(tau) > 1 else ...]).abs().min() / rms)
            )
        return values >= tau.double()

    def _masked(self, v: torch.Tensor, tau: torch.Tensor, by: torch.Tensor | None = None) -> torch.Tensor:
        return torch.where(self._kept((v if by is None else by).abs(), tau.double().sqrt()), v, 0.0)

    def _v(self, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
        v = x
        if adapter.router is not None:
            router = unpack(adapter.router, adapter.router_scale, torch.float64)
            v = x @ router.t() if adapter.router_tau is None else self._masked(x, adapter.router_tau) @ router
        return v if adapter.shift is None else v - adapter.shift.double()

    def _output(self, adapter: Adapter, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Without the bias."""
        by = None if adapter.gate is None else self.gates[adapter.gate]
        v = self._masked(self._v(adapter, x), adapter.tau, by)
        return v @ (weight.t() if adapter.weight is None else unpack(adapter.weight, adapter.weight_scale, torch.float64))

    def _settle(self, first: str, x: torch.Tensor, dense: torch.Tensor, weight: torch.Tensor) -> None:
        """Thresholds, and their mean kept number, from the values that are compared with them."""
        adapter = self.adapters[first]
        made: dict[str, Any] = {}
        if adapter.router_tau is not None:
            made["router_tau"] = self._gaps(x.abs(), 0.0).square().float()
            made["router_kept"] = float((x.square() >= made["router_tau"]).sum(-1).double().mean())
            adapter = replace(adapter, **made)
        if adapter.kind in ("rank", "neuron", "gated"):
            v = self.gates[adapter.gate].abs() if adapter.gate is not None else self._v(adapter, x).abs()
            tau = self._gaps(v.reshape(-1, 1) if len(adapter.tau) == 1 else v, 0.0).square().float()
            if len(tau) > 4:  # one threshold that always keeps and one that never keeps
                tau[1], tau[2] = 0, torch.inf
            adapter = replace(adapter, tau=tau, kept=float((v.square() >= tau).sum(-1).double().mean()))
        if adapter.exact_tau is not None:
            assert adapter.bias is not None
            y = self._output(adapter, x, weight) + adapter.bias.double()
            tau = self._gaps(y, torch.inf).float()
            tau[1], tau[2] = torch.inf, -torch.inf
            adapter = replace(adapter, exact_tau=tau, exact_kept=float((y >= tau).sum(-1).double().mean()))
        self.adapters[first] = adapter.costed() if adapter.weight is not None else adapter
        self.margin = float("inf")

    def _gaps(self, values: torch.Tensor, instead: float) -> torch.Tensor:
        """The middle of the widest gap in each column, among gaps with a sixth of the values on either side; ``instead`` where
        the
        gap is within rounding."""
        ordered, _ = values.flatten(0, -2).sort(dim=0)
        skip = len(ordered) // 6
        inner = ordered[skip : len(ordered) - skip]
        widest = inner.diff(dim=0).argmax(dim=0, keepdim=True)
        below, above = inner.gather(0, widest)[0], inner.gather(0, widest + 1)[0]
        safe = (above - below) / 2 > 1.1 * self.near * values.square().mean().sqrt()
        return torch.where(safe, (above + below) / 2, instead)

    @property
    def near(self) -> float:
        """Lower bound for ``margin``: the rounding error of values, relative to their root mean square."""
        return torch.finfo(self.dtype).eps * (64 if self.dtype == torch.float32 else 4)
