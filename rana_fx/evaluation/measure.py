"""Count the values that an adapted model keeps on given text.

In: a model with a plan attached, and calls of it. Out: kept ranks per adapter and the measured budget, to compare with the
target budget. A ``Probe`` runs the rewritten graph with its reference kernels and counts before every masked matmul.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx._backend import rewrite
from rana_fx.apply import gate_mask
from rana_fx.calibration.probe import Probe, call_before, probing
from rana_fx.cost import Kept
from rana_fx.errors import NoPlan
from rana_fx.kernels.ops import masked_gemv, masked_rows
from rana_fx.kernels.reference import kept
from rana_fx.modules import unwrap
from rana_fx.plan import Plan
from rana_fx.runtime.attachment import attached


@dataclass(frozen=True)
class Measurement:
    """Over ``tokens`` real tokens: kept fraction per adapter, and cost per token over the dense model's.

    Real tokens are those that are not padding. ``router_density``: the fraction of its inputs that a masked router reads, for
    adapters that have one. ``exact_density``: the fraction of outputs computed exactly, for adapters that have exact outputs.
    """

    tokens: int
    density: dict[str, float]
    budget_flops: float
    budget_bytes: float
    router_density: dict[str, float]
    exact_density: dict[str, float]


@dataclass(frozen=True, eq=False)
class MaskedNode:
    """A node of a rewritten graph at which an adapter applies a mask.

    ``part``: the thresholds of the mask: "tau" masks ranks, "router_tau" the inputs of the router, "exact_tau" outputs.
    ``value``: the masked tensor. ``tau``: the thresholds of its square; None where zeros of ``value`` are the mask.
    """

    node: fx.Node
    adapter: str
    part: str
    value: fx.Node
    tau: fx.Node | None

    @property
    def is_gate(self) -> bool:
        """Whether it sets an activated gate to zero, which the matmuls behind it skip."""
        return self.node.target is gate_mask


def masked_nodes(graph: fx.Graph) -> list[MaskedNode]:
    """All masks of a rewritten graph, in order, by the annotations of passes/emit.py in ``node.meta``.

    Behind a gate, the matmul with down is a masked node too, whose thresholds keep all values except zeros.
    """
    found: list[MaskedNode] = []
    for node in graph.nodes:
        annotation = node.meta.get("rana")
        if annotation is None:
            continue
        adapter, part = annotation.adapter, annotation.part
        if node.target in (masked_gemv, gate_mask):
            found.append(MaskedNode(node, adapter, part, node.args[0], node.args[1]))
        elif node.target is masked_rows and part == "exact_tau":
            found.append(MaskedNode(node, adapter, part, node.args[1], None))
    return found


class Meter:
    """Runs the adapted model, with the backend's option ``prefill``, and counts kept values."""

    def __init__(self, model: nn.Module, plan: Plan, *, prefill: str = "masked") -> None:
        self._plan, self._prefill = plan, prefill
        self._probe = Probe(model, self._instrument)
        # by name and part of the adapter
        self._kept: dict[tuple[str, str], float] = {}
        self._rows: dict[tuple[str, str], int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's output for one call."""
        with torch.no_grad():
            return self._probe.forward(*args, **kwargs)

    def run(self, batch: Any) -> Any:
        """The adapted model's output for a batch as ``adapt`` takes them."""
        with torch.no_grad():
            return self._probe.run(batch)

    def result(self) -> Measurement:
        """The measurement over all calls so far."""
        mean = {key: self._kept[key] / self._rows[key] for key in self._kept if self._rows[key]}
        kept = {name: value for (name, part), value in mean.items() if part == "tau"}
        inputs = {name: value for (name, part), value in mean.items() if part == "router_tau"}
        exact = {name: value for (name, part), value in mean.items() if part == "exact_tau"}
        means = Kept.by_name(kept, inputs, exact)
        adapters = {adapter.name: adapter for adapter in self._plan.adapters}
        return Measurement(
            tokens=max(self._rows.values(), default=0),
            density={name: value / adapters[name].ranks for name, value in kept.items()},
            budget_flops=self._plan.expected_budget("flops", kept=means),
            budget_bytes=self._plan.expected_budget("bytes", kept=means),
            router_density={name: value / adapters[name].width for name, value in inputs.items()},
            exact_density={name: value / (adapters[name].out or 1) for name, value in exact.items()},
        )

    def _instrument(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        rewrite(graph_module, example_inputs, prefill=self._prefill)
        counted: set[tuple[fx.Node, str, str]] = set()
        for mask in masked_nodes(graph_module.graph):
            key = (mask.value, mask.adapter, mask.part)
            if key not in counted and not mask.is_gate:
                counted.add(key)
                call_before(mask.node, self._count, (mask.adapter, mask.part), mask.value, mask.tau)

    def _count(self, key: tuple[str, str], v: Tensor, tau: Tensor | None = None) -> None:
        """Count the values of v that ``tau`` keeps, or that are not zero."""
        rows = self._probe.real(v)
        self._kept[key] = self._kept.get(key, 0.0) + float((rows != 0 if tau is None else kept(rows, tau)).sum())
        self._rows[key] = self._rows.get(key, 0) + len(rows)


@contextmanager
def measuring(model: nn.Module) -> Iterator[Meter]:
    """A ``Meter`` for a model with a plan attached; the model is in evaluation mode inside.

    Raises:
        NoPlan.
    """
    found = attached(model)
    if found is None:
        raise NoPlan(site=next((name for name, _ in model.named_parameters()), type(model).__name__))
    model = unwrap(model)
    with probing(model):
        yield Meter(model, found.plan)
