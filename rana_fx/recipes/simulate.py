"""Try adapters on a model before there is a plan: what they really keep, and how far the model's output moves.

In: an instrumented model, batches and adapters. Out: an ``Outcome``. Adapters act in place of linears as their definition says,
in plain PyTorch; each reads what the adapted linears before it produce, so kept ranks are those of the adapted model. A gated
one has its mask from its gate's output, which comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.calibration.instrumented import InstrumentedModel
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.sensitivity import divergence
from rana_fx.formats import unpack


@dataclass(frozen=True)
class Outcome:
    """Means over tokens: kept ranks, router inputs and exact outputs by adapter, and the divergence of the model's outputs from
    the dense model's.
    """

    kept: dict[str, float]
    router_kept: dict[str, float]
    divergence: float
    exact_kept: dict[str, float]


class Troupe:
    """Adapters ready to act in place of the linears they are for."""

    def __init__(self, model: InstrumentedModel, layout: Layout, adapters: Sequence[Adapter]) -> None:
        self._model = model
        self._of = {name: adapter for adapter in adapters for name in adapter.sites}
        self._activations = {block.down: block.activation for block in layout.blocks}
        self._gated = {adapter.gate: adapter for adapter in adapters if adapter.gate is not None}
        self._parts: dict[str, dict[str, Tensor | None]] = {}
        self._matrices: dict[str, dict[str, tuple[Tensor, Tensor | None]]] = {}  # as stored
        self._columns: dict[str, tuple[int, int]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        for adapter in adapters:
            self._prepare(layout, adapter)
        self._last: dict[str, tuple[Tensor, Tensor]] = {}
        self._masks: dict[str, list[Tensor]] = {}  # that down has not met yet, first come first
        self.sums: dict[tuple[str, str], float] = {}
        self.tokens: dict[str, int] = {}

    def _prepare(self, layout: Layout, adapter: Adapter) -> None:
        sites = [layout.sites[name] for name in adapter.sites]
        first, start = sites[0].weight, 0
        self._dtype[adapter.name] = first.dtype
        for site in sites:
            self._columns[site.name] = (start, start + site.out_features)
            start += site.out_features
        matrices: dict[str, tuple[Tensor, Tensor | None]] = {}
        for key in ("weight", "router"):
            matrix = getattr(adapter, key)
            if matrix is not None:
                matrices[key] = (matrix.to(first.device), _on(getattr(adapter, f"{key}_scale"), first))
        if adapter.weight is None:
            views = [site.view for site in sites]
            matrices["weight"] = ((views[0] if len(views) == 1 else torch.cat(views)).detach().t(), None)
        self._matrices[adapter.name] = matrices
        bias = adapter.bias
        if bias is None and adapter.weight is None and any(site.bias is not None for site in sites):
            bias = torch.cat([first.new_zeros(s.out_features) if s.bias is None else s.bias.detach() for s in sites])
        vectors = {"tau": adapter.tau, "router_tau": adapter.router_tau, "bias": bias, "shift": adapter.shift}
        if adapter.exact_tau is not None:  # it has one site
            matrices["exact"] = (sites[0].view.detach(), None)
            own = sites[0].bias
            vectors |= {"exact_tau": adapter.exact_tau, "exact_bias": None if own is None else own.detach()}
        self._parts[adapter.name] = {key: _on(value, first) for key, value in vectors.items()}

    def step(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """For ``InstrumentedModel.run``."""
        adapter = self._of.get(name)
        if adapter is not None:
            held = self._last.get(adapter.name)
            if held is None or held[0].data_ptr() != x.data_ptr() or held[0].shape != x.shape:
                held = self._last[adapter.name] = (x, self._act(adapter, x))
            start, stop = self._columns[name]
            y = held[1][..., start:stop].reshape(y.shape).to(y.dtype)
        if name in self._gated:
            self._gate(self._gated[name], y)
        return y

    def forget(self) -> None:
        """Before another batch: its tensors may lie where those of the last one lay."""
        self._last.clear()
        self._masks.clear()

    def _gate(self, adapter: Adapter, y: Tensor) -> None:
        activation, tau = self._activations[adapter.name], self._parts[adapter.name]["tau"]
        assert activation is not None and tau is not None
        kept = activation(y.reshape(-1, y.shape[-1])).float().square() >= tau
        self._masks.setdefault(adapter.name, []).append(kept)

    def _act(self, adapter: Adapter, x: Tensor) -> Tensor:
        parts, matrices = self._parts[adapter.name], self._matrices[adapter.name]
        tau, dtype = parts["tau"], self._dtype[adapter.name]
        assert tau is not None
        given = v = x.to(dtype)
        self.tokens[adapter.name] = self.tokens.get(adapter.name, 0) + len(self._model.real(v))
        if "router" in matrices:
            # what is stored in few bits is unpacked here and dropped: all of a model at once would be a second model
            router = unpack(*matrices["router"], dtype)
            if parts["router_tau"] is not None:
                v = self._masked(adapter.name, "router_kept", v, parts["router_tau"])
                router = router.t()
            v = v @ router.t()
        if parts["shift"] is not None:
            v = v - parts["shift"]
        if adapter.kind == "gated":
            v = self._only(adapter.name, "kept", v, self._masks[adapter.name].pop(0).view(v.shape))
        else:
            v = self._masked(adapter.name, "kept", v, tau)
        out = v @ unpack(*matrices["weight"], dtype)
        out = out if parts["bias"] is None else out + parts["bias"].to(out.dtype)
        return out if "exact" not in matrices else self._exact(adapter.name, given, out)

    def _exact(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y with the model's own outputs in the place of those that reach their thresholds, counted."""
        parts, (matrix, _) = self._parts[name], self._matrices[name]["exact"]
        tau, bias = parts["exact_tau"], parts["exact_bias"]
        assert tau is not None
        mask = y >= tau
        self._count(name, "exact_kept", mask)
        return torch.where(mask, torch.nn.functional.linear(x, matrix, bias), y)

    def _masked(self, name: str, part: str, v: Tensor, tau: Tensor) -> Tensor:
        return self._only(name, part, v, v.float().square() >= tau)

    def _only(self, name: str, part: str, v: Tensor, mask: Tensor) -> Tensor:
        """v where the mask is set, counted."""
        self._count(name, part, mask)
        return torch.where(mask, v, v.new_zeros(()))

    def _count(self, name: str, part: str, mask: Tensor) -> None:
        self.sums[name, part] = self.sums.get((name, part), 0.0) + float(self._model.real(mask).sum())

    def means(self, part: str) -> dict[str, float]:
        return {name: total / max(1, self.tokens[name]) for (name, which), total in self.sums.items() if which == part}


def attempt(
    model: InstrumentedModel, layout: Layout, adapters: Sequence[Adapter], batches: Iterable[Any], dense: Sequence[Any]
) -> Outcome:
    """Run adapters over ``batches``; ``dense``: the dense model's outputs for the first of these, to compare with."""
    troupe = Troupe(model, layout, adapters)
    moved, rows = 0.0, 0
    for index, batch in enumerate(batches):
        output = model.run(batch, troupe.step)
        troupe.forget()
        if index < len(dense):
            found, count = divergence(output, dense[index], model)
            moved, rows = moved + found, rows + count
    return Outcome(troupe.means("kept"), troupe.means("router_kept"), moved / max(1, rows), troupe.means("exact_kept"))


def _on(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.to(like.device)
