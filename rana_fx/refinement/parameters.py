"""What a refinement trains: Parameters, and adapters made of them.

In: adapters and the layout of their model. Out: Parameters, all zero at first; the adapters that they make, through which
gradients flow; and at the end adapters as a plan stores them. Trained are floating factors, biases (adapters without one get
one), and the scales of factors in 8 or 4 bits, whose integers stay. A mask of a linear's inputs gets a weight of its own, a copy
of the model's, which a plan cannot change. Each Parameter is in units of the root mean square of what it is added to (a bias: of
the outputs that inputs of size one would have), so that one learning rate suits all. They are fp32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rana_fx.adapter import MATRICES, Adapter
from rana_fx.calibration.layout import Layout
from rana_fx.formats import Matrix, is_plain


class Trained:
    """The Parameters of all adapters, and what they make."""

    def __init__(self, layout: Layout, adapters: Sequence[Adapter]) -> None:
        self._layout, self._adapters = layout, adapters
        self._starts: dict[tuple[int, str], Tensor] = {}
        self._units: dict[tuple[int, str], Tensor] = {}
        self._moves: dict[tuple[int, str], nn.Parameter] = {}
        for index, adapter in enumerate(adapters):
            for key, start, unit in _parts(layout, adapter):
                self._starts[index, key], self._units[index, key] = start, unit
                self._moves[index, key] = nn.Parameter(torch.zeros_like(start))

    def parameters(self) -> list[nn.Parameter]:
        """For an optimizer."""
        return list(self._moves.values())

    def adapters(self) -> list[Adapter]:
        """With gradients; factors in few bits are dequantized."""
        made: list[dict[str, Any]] = [{} for _ in self._adapters]
        for index, key in self._moves:
            made[index][key] = self._value(index, key)
        for changed, adapter in zip(made, self._adapters, strict=True):
            for key in MATRICES:
                if f"{key}_scale" in changed:
                    stored = Matrix.of(getattr(adapter, key), changed[f"{key}_scale"])
                    changed |= {key: stored.dequantize(torch.float32), f"{key}_scale": None}
        return [replace(adapter, **changed) for changed, adapter in zip(made, self._adapters, strict=True)]

    @torch.no_grad()
    def stored(self) -> list[Adapter]:
        """As a plan holds them: on the CPU, in the dtypes that they had, new factors in the model's."""
        made: list[dict[str, Any]] = [{} for _ in self._adapters]
        for index, key in self._moves:
            adapter = self._adapters[index]
            before = getattr(adapter, key)
            dtype = self._layout.sites[adapter.sites[0]].weight.dtype if before is None else before.dtype
            made[index][key] = self._value(index, key).to("cpu", dtype, copy=True)
        return [replace(adapter, **changed) for changed, adapter in zip(made, self._adapters, strict=True)]

    def _value(self, index: int, key: str) -> Tensor:
        return self._starts[index, key] + self._units[index, key] * self._moves[index, key]


def _parts(layout: Layout, adapter: Adapter) -> list[tuple[str, Tensor, Tensor]]:
    """(name, value, unit) of what is trained of an adapter, on the model's device, fp32."""
    sites = [layout.sites[name] for name in adapter.sites]
    device = sites[0].weight.device
    squares = sum(float(site.view.detach().float().square().sum()) for site in sites)
    biases = [
        torch.zeros(site.out_features, device=device) if site.bias is None else site.bias.detach().float() for site in sites
    ]
    bias = torch.cat(biases) if adapter.bias is None else adapter.bias.to(device).float()
    found = [("bias", bias, torch.tensor((squares / len(bias)) ** 0.5, device=device))]
    for key in MATRICES:
        value, scale = getattr(adapter, key), getattr(adapter, f"{key}_scale")
        if value is not None and is_plain(value):
            found.append((key, value.to(device).float(), _size(value).to(device)))
        elif scale is not None:
            found.append((f"{key}_scale", scale.to(device).float(), scale.to(device).float()))
    if adapter.kind == "neuron" and adapter.weight is None:
        weight = torch.cat([site.view.detach().float() for site in sites]).t().contiguous()
        found.append(("weight", weight, _size(weight)))
    return found


def _size(value: Tensor) -> Tensor:
    return value.detach().float().square().mean().sqrt()
