"""Run the pipeline over one graph.

In: a graph module as Dynamo or torch.export made it, and its inputs. Out: the same module rewritten in place, and a
``Result`` that says what was replaced. RANA_FX_DUMP=<folder> writes the graph before and after.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx
from torch._inductor.custom_graph_pass import get_hash_for_files

from rana_fx import apply
from rana_fx.graph import record
from rana_fx.graph.normalize import prepare
from rana_fx.kernels import reference
from rana_fx.passes import PIPELINE
from rana_fx.passes.check_foreign_lora import check_alone
from rana_fx.passes.match import Matches, match_plan
from rana_fx.passes.rewrite_lora import add_lowrank
from rana_fx.passes.verify import verify
from rana_fx.plan import Plan

_dumps = itertools.count()


@dataclass(frozen=True)
class Result:
    """Linears replaced per pass, and what was matched."""

    replaced: dict[str, int]
    matches: Matches


def run(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[object] = (),
    *,
    plan: Plan | None = None,
    prefill: str = "masked",
) -> Result:
    """Rewrite in place. Without any adapter for the graph's weights nothing changes.

    Args:
        example_inputs: values of the placeholders; exported modules keep their weights as attributes and need none.
        plan: to use instead of the plan attached to the weights.
        prefill: one of rana_fx.runtime.prefill.MODES.

    Raises:
        LoraBeside.
    """
    prepare(graph_module, example_inputs)
    matches = match_plan(graph_module, example_inputs, plan, prefill)
    replaced = dict.fromkeys((step.__name__ for step in PIPELINE), 0)
    if not matches.found:
        if add_lowrank(graph_module, example_inputs, matches.attachments):
            graph_module.recompile()
        return Result(replaced, matches)
    check_alone(matches)
    order = next(_dumps)
    _dump(graph_module, order, "before")
    for step in PIPELINE:
        for match in matches.found:
            replaced[step.__name__] += step(graph_module, match)
    verify(graph_module, matches, sum(replaced.values()))
    add_lowrank(graph_module, example_inputs, matches.attachments)
    graph_module.recompile()
    _dump(graph_module, order, "after")
    return Result(replaced, matches)


def _dump(graph_module: fx.GraphModule, order: int, when: str) -> None:
    folder = os.environ.get("RANA_FX_DUMP")
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{order:02}.{when}.py").write_text(graph_module.print_readable(print_output=False))


@functools.cache
def sources_hash() -> bytes:
    """Hash of every file that can change generated code: Inductor's cache does not hash lowerings that live outside of it."""
    here = Path(__file__).resolve().parent
    kernels = Path(reference.__file__).resolve().parent
    files = sorted(str(path) for folder in (here, kernels) for path in folder.rglob("*.py"))
    return get_hash_for_files((*files, apply.__file__, record.__file__))
