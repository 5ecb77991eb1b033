"""Run passes over one graph: time, count, dump and verify each.

In: a graph module as Dynamo or torch.export made it, and its inputs (``run``); later Inductor's graph of the same code
(``Runner.run``). Out: the module rewritten in place, and a ``Result``: what each pass changed and declined, and how long it took.

RANA_FX_DUMP=<folder> writes the graph before and after every pass that changed it, and a report of all passes:
    00.05.rewrite_adapter.before.py, 00.05.rewrite_adapter.after.py    graph 0 before and after its pass 5
    00.report.txt                                                a line for each pass, and one for each node it declined
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import fx

from rana_fx.graph.operands import base_name
from rana_fx.passes import NORMALIZE, POST_GRAD, PRE_GRAD
from rana_fx.passes.base import Declined, EachMatch, Intended, Pass, PassResult, PostGrad, PreGrad
from rana_fx.passes.match import Matches, match_plan
from rana_fx.passes.verify import Verifier
from rana_fx.plan import Plan

Context = TypeVar("Context")

_graphs = itertools.count()


@dataclass(frozen=True)
class Record:
    """What one pass did to a graph. ``seconds``: in the pass itself; ``verify_seconds``: in checking the graph after it."""

    name: str
    result: PassResult
    seconds: float
    verify_seconds: float


@dataclass(eq=False)
class Runner:
    """Runs tuples of passes over one graph and the graphs derived from it, and keeps their records in order."""

    graph: int = field(default_factory=lambda: next(_graphs))
    records: list[Record] = field(default_factory=list)

    def run(
        self, passes: Sequence[Pass[Context]], graph_module: fx.GraphModule, context: Context, *, past_autograd: bool = False
    ) -> None:
        """Run passes in place; appends a record of each to ``records``.

        Args:
            passes: for example ``(*POST_GRAD, my_pass)``.
            context: what these passes take besides the graph.
            past_autograd: whether it is Inductor's graph, which is functional: dead code is removed after each pass, and strides
                are verified as well.

        Raises:
            AssertionError: the graph is not valid after a pass (``rana_fx.passes.verify``).
            What the passes raise.
        """
        start = time.perf_counter()
        verifier = Verifier(graph_module, past_autograd=past_autograd)
        setup, changed = time.perf_counter() - start, False
        for step in passes:
            before = _text(graph_module)
            start = time.perf_counter()
            result = step(graph_module, context)
            seconds, start = time.perf_counter() - start, time.perf_counter()
            if verifier.changed():
                changed = True
                try:
                    if past_autograd:
                        graph_module.graph.eliminate_dead_code()
                    verifier.verify()
                except (AssertionError, RuntimeError) as error:
                    raise AssertionError(f"after {step.__name__}: {error}") from error
                finally:
                    self._dump(graph_module, step.__name__, before)
            self.records.append(Record(step.__name__, result, seconds, time.perf_counter() - start + setup))
            setup = 0.0
        if changed:
            graph_module.recompile()
        self._report()

    def declined(self) -> list[tuple[str, Declined]]:
        """(name of the pass, place and reason), in order."""
        return [(record.name, declined) for record in self.records for declined in record.result.declined]

    def _dump(self, graph_module: fx.GraphModule, name: str, before: str) -> None:
        folder = _folder()
        if folder is not None:
            stem = f"{self.graph:02}.{len(self.records):02}.{name}"
            (folder / f"{stem}.before.py").write_text(before)
            (folder / f"{stem}.after.py").write_text(_text(graph_module))

    def _report(self) -> None:
        folder = _folder()
        if folder is None or not any(record.result.count or record.result.declined for record in self.records):
            return
        lines = []
        for record in self.records:
            times = f"{1e3 * record.seconds:9.2f} ms, verified in {1e3 * record.verify_seconds:.2f} ms"
            lines.append(f"{record.name:28} {record.result.count:5} changed {times}")
            lines += [f"    {declined.where}: {declined.reason}" for declined in record.result.declined]
        (folder / f"{self.graph:02}.report.txt").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Result:
    """What was matched in a graph, and what the passes did. ``runner``: runs further passes over the graphs derived from it."""

    matches: Matches
    runner: Runner

    @property
    def replaced(self) -> dict[str, int]:
        """Linears replaced, for each pass that replaces them."""
        names = [step.__name__ for step in PRE_GRAD if isinstance(step, EachMatch)]
        return {record.name: record.result.count for record in self.runner.records if record.name in names}

    @property
    def declined(self) -> tuple[tuple[str, Declined], ...]:
        """(name of the pass, place and reason): candidates for a rewrite that were not changed."""
        return tuple(("match", declined) for declined in self.matches.declined) + tuple(self.runner.declined())

    @property
    def not_applied(self) -> list[Declined]:
        """The declined linears of the plan, except those that an option or the plan leaves dense (``Intended``)."""
        planned = self.matches.planned
        planned |= {base_name(site) for site in planned}
        # the reason of a pass that ran before the search for linears is more specific than "not found"
        places = [*(place for _, place in self.runner.declined()), *self.matches.declined]
        found: dict[str, Declined] = {}
        for place in places:
            if place.where in planned and not isinstance(place, Intended):
                found.setdefault(place.where, place)
        return list(found.values())


def run(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[object] = (),
    *,
    plan: Plan | None = None,
    prefill: str = "masked",
) -> Result:
    """Run ``NORMALIZE`` and ``PRE_GRAD`` in place. Without an adapter for any weight of the graph no linear changes.

    Args:
        example_inputs: values of the placeholders; exported modules keep their weights as attributes and need none.
        plan: to use instead of the plan attached to the weights.
        prefill: one of rana_fx.runtime.prefill.MODES.

    Raises:
        LoraBeside, WeightsFreed.
    """
    runner = Runner()
    runner.run(NORMALIZE, graph_module, example_inputs)
    matches = match_plan(graph_module, example_inputs, plan, prefill)
    runner.run(PRE_GRAD, graph_module, PreGrad(example_inputs, matches, frozenset(graph_module.graph.nodes)))
    return Result(matches, runner)


def run_post_grad(
    result: Result, graph: fx.Graph, *, devices: tuple[str, ...] | None = None, passes: tuple[Pass[PostGrad], ...] = POST_GRAD
) -> None:
    """Run ``passes`` over a graph of Inductor, forward or backward, that was derived from the graph of ``result``."""
    graph_module = graph.owning_module
    assert graph_module is not None, "Inductor runs passes on the graphs of modules"
    result.runner.run(passes, graph_module, PostGrad(devices), past_autograd=True)


def _folder() -> Path | None:
    name = os.environ.get("RANA_FX_DUMP")
    if not name:
        return None
    Path(name).mkdir(parents=True, exist_ok=True)
    return Path(name)


def _text(graph_module: fx.GraphModule) -> str:
    """The graph as Python; empty unless dumps are written."""
    return graph_module.print_readable(print_output=False) if _folder() is not None else ""
