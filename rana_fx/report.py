"""``explain``: every linear of a model, what happens to it, and why.

In: a model (with or without a plan) and one example batch. Out: a ``Report``, which prints as a summary and converts to JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from rana_fx import report_rows
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.layout import OUTSIDE_OF_GRAPHS, Site, Unread
from rana_fx.calibration.probe import Probe, probing
from rana_fx.graph.operands import base_name
from rana_fx.modules import unwrap
from rana_fx.passes.runner import run
from rana_fx.plan import Plan
from rana_fx.report_rows import Row as Row
from rana_fx.runtime.attachment import attached
from rana_fx.runtime.kernel_choice import kernel_choice
from rana_fx.runtime.prefill import MODES, costs_more, memory_of, tokens_masked
from rana_fx.step_time import StepTime, expected, step_time
from rana_fx.summary import details


@dataclass(frozen=True)
class Report:
    """Rows in order of execution, and totals. ``memory``: bytes of linears and factors for each mode of the option "prefill".

    ``notes``: of the plan as a whole, for example that the backward pass failed during calibration; then a line for each linear
    whose adapter is not applied in the graphs of the batch, with the reason. ``scope``: which linears the plan's budget counts.
    ``step``: the expected time of a decoded token, where the model is on a GPU.
    """

    model: str
    plan: str | None
    budget: float | None
    expected_flops: float
    expected_bytes: float
    sites: int
    groups: int
    blocks: int
    graphs: int
    rows: tuple[Row, ...]
    memory: dict[str, int]
    notes: tuple[str, ...] = ()
    scope: str = "blocks"
    step: StepTime | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able facts."""
        return asdict(self)

    def __str__(self) -> str:
        """By role and by layers, what is left dense, and the first remarks: at most 36 lines of 80 columns."""
        return "\n".join(self.lines())

    def lines(self, *, layers: bool = False) -> list[str]:
        """The report as text. layers: a line for each linear, and all remarks, instead of the summary."""
        head = f"{self.model}: {self.sites} linears in {self.groups} groups, {self.blocks} MLP blocks, {self.graphs} graph(s); "
        head += f"plan {self.plan}, expected flops {self.expected_flops:.3f}" if self.plan else "no plan attached"
        lines = report_rows.wrapped(head + (", output head included" if self.scope == "all" else ""))
        if self.memory:
            sizes = ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in self.memory.items())
            lines += report_rows.wrapped(f"  linears in memory: {sizes}")
        if self.step is not None:
            lines += report_rows.wrapped(f"  {expected(self.step)}")
        if layers:
            return [*lines, *(f"  note: {text}" for text in self.notes), *report_rows.every_row(self.rows)]
        few = [(row.site, text) for row in self.rows for text in row.detail.split("; ")]
        return [
            *lines,
            *report_rows.by_role(self.rows),
            *report_rows.by_layers(self.rows, "flops"),
            *report_rows.kernels(self.rows),
            *report_rows.left_dense(self.rows),
            *report_rows.too_few_tokens(few),
            *report_rows.counted_remarks(self.notes),
        ]


def explain(model: nn.Module, example_inputs: Any) -> Report:
    """Trace a model on one batch and report, for each linear, what the plan does and which adapters would not be applied.

    Nothing is compiled: the rewritten graphs run once, operation by operation, without gradients.

    Args:
        model: any module that runs under torch.compile, with or without a plan attached. It runs once, in evaluation mode, and is
            not changed. Code that torch.compile made earlier in this process is compiled again on its next call.
        example_inputs: one batch, as ``rana_fx.adapt`` takes them.

    Returns:
        A ``Report``: a row for each linear with its role, shape, action, cost over dense and the reason; and the bytes of linears
        and factors for each mode of the option "prefill". ``print(report)`` shows a summary by role and by layers,
        ``report.lines(layers=True)`` has a line for each linear, ``report.to_dict()`` is JSON-able.

    Raises:
        NoLinears: the traced graphs contain no linear inside a block.
        NonFinite: a weight or an input of a linear has NaN or Inf values.
        TraceFailed: the model does not run, or cannot be traced, on this batch.
        WeightsFreed: the model was compiled with ``prefill="factors"``.
        CompilationDisabled: torch.compile is switched off.
        WeightAbsent: a weight is on the meta device, without data.
    """
    layout = calibrate(model, [example_inputs], progress=False).layout
    found = attached(model)
    plan = None if found is None else found.plan
    by_rows = {} if found is None else found.by_rows
    rows = [_row(site, plan, by_rows.get(site.name)) for site in layout.sites.values()]
    known = set(layout.sites)
    rows += [
        Row(skip.site, "-", "-", (), "skipped", skip.reason, 1.0, 1.0, None) for skip in layout.skips if skip.site not in known
    ]
    rows += [Row(item.module, "-", "-", (), "skipped", _unread(item), 1.0, 1.0, None) for item in layout.unread]
    return Report(
        model=type(unwrap(model)).__name__,
        plan=None if plan is None else plan.digest()[:12],
        budget=None if plan is None else plan.budget,
        expected_flops=1.0 if plan is None else plan.expected_budget("flops"),
        expected_bytes=1.0 if plan is None else plan.expected_budget("bytes"),
        sites=len(layout.sites),
        groups=len(layout.groups),
        blocks=len(layout.blocks),
        graphs=layout.graphs,
        rows=tuple(rows),
        memory=_memory(plan),
        notes=() if plan is None else (*plan.notes(), *_left(model, example_inputs, plan)),
        scope="blocks" if plan is None else plan.scope,
        step=step_time(layout, plan, next(iter(layout.sites.values())).weight.device),
    )


def _left(model: nn.Module, batch: Any, plan: Plan) -> list[str]:
    """A line for each linear whose adapter is not applied in the graphs that a batch is traced to."""
    met: set[str] = set()
    reasons: dict[str, list[str]] = {}

    def rewrite(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        found = run(graph_module, example_inputs)
        met.update(linear.name for match in found.matches.found for linear in match.linears)
        met.update(place.where for _, place in found.declined)
        for place in found.not_applied:
            kept = reasons.setdefault(place.where, [])
            if place.reason not in kept:
                kept.append(place.reason)

    model = unwrap(model)
    with probing(model), torch.no_grad():
        Probe(model, rewrite).run(batch)
    for site in (site for adapter in plan.adapters for site in adapter.sites if site not in met and base_name(site) not in met):
        reasons.setdefault(site, []).append("no graph of this batch has it")
    return [f"{site}: the plan is not applied here: {'; '.join(found)}" for site, found in reasons.items()]


def _memory(plan: Plan | None) -> dict[str, int]:
    if plan is None:
        return {}
    found = memory_of(plan)
    return {"without a plan": found.dense, "factors alone": found.factors} | {
        f"prefill={mode}": found.total(mode) for mode in MODES
    }


def _row(site: Site, plan: Plan | None, by_rows: str | None) -> Row:
    shape = (site.out_features, site.in_features)
    adapter = None if plan is None else plan.adapter_of(site.name)
    beside = None if plan is None else next((made for made in plan.adapters if site.name in made.also), None)
    if adapter is None and beside is not None:
        detail = f"rows of neurons that {beside.name} drops are not needed"
        flops, read = beside.flops / beside.dense_flops, beside.bytes / beside.dense_bytes
        return Row(site.name, site.role, site.op, shape, beside.kind, detail, flops, read, None)
    if plan is None or adapter is None:
        reason = _reason(site, plan)
        return Row(site.name, site.role, site.op, shape, "dense", reason, 1.0, 1.0, None)
    detail = f"{adapter.kept:.1f} of {adapter.ranks} kept"
    detail += f" by the output of {adapter.gate}" if adapter.gate is not None else ""
    detail += details(adapter)
    if len(adapter.sites) > 1:
        detail += f", {'input' if adapter.router is None else 'router'} shared by {len(adapter.sites)}"
    if adapter.error is not None:
        detail += f", error {adapter.error:.4f}"
    most = tokens_masked(plan, adapter, site.weight)
    if by_rows is not None:
        detail += f", masked kernel not used ({by_rows}): dense matmul"
    elif most:
        detail += f", masked kernel up to {most} tokens"
    else:
        detail += ", masked kernel not expected to be faster on this device: dense matmul"
    if costs_more(plan, adapter):
        detail += ", more FLOPs than dense during prefill"
    detail += "".join(f"; {text}" for text in plan.notes(site.name))
    flops, read = adapter.flops / adapter.dense_flops, adapter.bytes / adapter.dense_bytes
    facts = (adapter.kind, detail, flops, read, adapter.error)
    if by_rows is not None or not most:
        return Row(site.name, site.role, site.op, shape, *facts)
    kernel = kernel_choice(adapter, {record.name: record for record in plan.sites}, site.weight.device)
    return Row(site.name, site.role, site.op, shape, *facts, most, kernel.name, kernel.slower)


def _reason(site: Site, plan: Plan | None) -> str:
    if plan is None:
        return "no plan attached" if site.counted else f"outside the budget ({site.role})"
    reasons = [skip.reason for skip in plan.left if f"{site.name}.".startswith(f"{skip.site}.")]
    return "; ".join(reasons) or "not adapted by the recipe"


def _unread(item: Unread) -> str:
    return f"{item.linears} {OUTSIDE_OF_GRAPHS if item.eager else 'did not run in this batch'}"
