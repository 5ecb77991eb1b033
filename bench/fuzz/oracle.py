"""Reference of an adapted model, without graphs and kernels: every linear by its adapter's formula, eagerly, in fp64.

In: a model, its plan, and the sites at which the compiled graph reported that the plan is not applied. Out: a copy of the model
in fp64 that applies the plan. It shares no code with rana_fx.apply: it implements the formulas of rana_fx/adapter.py separately.

``margin``: the smallest relative distance of a compared value to its threshold. Below ``NEAR`` rounding may decide either way,
and the example is inconclusive.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.fuzz.model import Lin, Transformer
from rana_fx.adapter import Adapter
from rana_fx.formats import unpack
from rana_fx.plan import Plan

NEAR = 1e-4  # the relative error of fp32 activations after two layers is about 1e-6


class Oracle:
    """``model``: a copy in fp64 in which every planned linear and gate is replaced, except the sites ``without``.

    change: each weight of the model and the adapters (no threshold) is multiplied by 1 + change * r, r random in (-1, 1).
    """

    def __init__(self, model: Transformer, plan: Plan, *, without: Collection[str] = (), change: float = 0.0) -> None:
        self.margin = float("inf")
        self.change, self.random = change, torch.Generator().manual_seed(0)
        self.model = copy.deepcopy(model).double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(self._changed(parameter))
        modules: dict[str, Any] = dict(self.model.named_modules())
        if modules["head"].weight is modules["embed"].weight:
            modules["embed"] = modules["head"]  # a tied head goes by the name of the table
        sizes = {record.name: record.out_features for record in plan.sites}
        for adapter in (made.on(self.model.embed.weight.device) for made in plan.adapters):
            first = 0
            for site in adapter.sites:
                span = slice(first, first + sizes[site])
                first = span.stop
                if site in without:
                    continue
                if adapter.kind == "gated":
                    assert adapter.gate is not None
                    self._gate(modules, adapter, site)
                else:
                    function = _with_added_bias(self._linear(adapter, span, modules[site]), modules[site])
                    setattr(modules[site], "replacement" if isinstance(modules[site], Lin) else "forward", function)

    def _changed(self, weights: Tensor) -> Tensor:
        """In fp64."""
        if not self.change:
            return weights.double()
        r = torch.rand(weights.shape, generator=self.random, dtype=torch.float64).to(weights.device)
        return weights.double() * (1 + self.change * (2 * r - 1))

    def _keep(self, scores: Tensor, tau: Tensor) -> Tensor:
        tau = tau.double()
        finite = (tau > 0) & tau.isfinite()
        if bool(finite.any()) and scores.numel():
            near = ((scores - tau).abs() / tau.abs().clamp_min(1e-300))[..., finite.expand(scores.shape[-1])]
            if near.numel():
                self.margin = min(self.margin, float(near.nan_to_num(nan=float("inf")).min()))
        return ~(scores < tau)

    def _gate(self, modules: dict[str, Any], adapter: Adapter, site: str) -> None:
        mlp = modules[site.rpartition(".")[0]]
        mlp.gate_mask = lambda a: torch.where(self._keep(a.square(), adapter.tau), a, 0.0)
        if adapter.bias is not None:
            bias = self._changed(adapter.bias)
            mlp.down.replacement = _with_added_bias(lambda h: F.linear(h, mlp.down.matrix(), bias), mlp.down)

    def _linear(self, adapter: Adapter, span: slice, module: Lin | nn.Linear) -> Callable[[Tensor], Tensor]:
        def matrix(values: Tensor, scale: Tensor | None) -> Tensor:
            return self._changed(unpack(values, scale, torch.float64))

        router = None if adapter.router is None else matrix(adapter.router, adapter.router_scale)
        weight = None if adapter.weight is None else matrix(adapter.weight, adapter.weight_scale)[:, span]
        shift = None if adapter.shift is None else self._changed(adapter.shift)
        bias = None if adapter.bias is None else self._changed(adapter.bias[span])

        def forward(x: Tensor) -> Tensor:
            v = x
            if router is not None:
                if adapter.router_tau is not None:
                    v = torch.where(self._keep(x.square(), adapter.router_tau), x, 0.0) @ router
                else:
                    v = x @ router.t()
            if shift is not None:
                v = v - shift
            v = torch.where(self._keep(v.square(), adapter.tau), v, 0.0)
            if weight is None:
                return F.linear(v, _matrix(module), _own_bias(module) if bias is None else bias)
            y = v @ weight
            y = y if bias is None else y + bias
            if adapter.exact_tau is None:
                return y
            tau = adapter.exact_tau.double()
            finite = tau.isfinite()
            if bool(finite.any()) and y.numel():
                scale = y[..., finite].abs().clamp_min(float(y.abs().max()) * 1e-2 + 1e-300)
                self.margin = min(self.margin, float(((y[..., finite] - tau[finite]).abs() / scale).min()))
            return torch.where(y >= tau, F.linear(x, _matrix(module), _own_bias(module)), y)

        return forward


def _with_added_bias(forward: Callable[[Tensor], Tensor], module: Lin | nn.Linear) -> Callable[[Tensor], Tensor]:
    """Where the model adds the bias behind the matmul, it is no part of the linear, and is added to whatever replaces that."""
    bias = module.bias
    if bias is None or _own_bias(module) is not None:
        return forward
    return lambda x: forward(x) + bias


def _matrix(module: Lin | nn.Linear) -> Tensor:
    """(out, in)."""
    return module.matrix() if isinstance(module, Lin) else module.weight


def _own_bias(module: Lin | nn.Linear) -> Tensor | None:
    """The bias of the linear itself."""
    return module.bias if not isinstance(module, Lin) or module.form in ("linear", "addmm") else None
