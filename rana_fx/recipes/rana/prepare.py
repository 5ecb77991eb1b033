"""What recipe "rana" computes of a calibration before a budget matters: gradients, candidates, outputs of the dense model.

In: a problem and an instrumented model. Out: ``Prepared``, which any number of budgets in one metric can be allocated from.
Operating points that an allocation computes are kept in the candidates for later ones: they depend on nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from rana_fx.calibration.instrumented import InstrumentedModel
from rana_fx.calibration.sensitivity import Sensitivity, compared, sensitivities
from rana_fx.graph.linears import Skip
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.decision import Decision
from rana_fx.recipes.rana.eligible_mlps import eligible_mlps
from rana_fx.recipes.rana.make_candidates import make_decisions
from rana_fx.recipes.rana.options import Options
from rana_fx.recipes.rana.units import Unit, units_of


@dataclass(frozen=True, eq=False)
class Prepared:
    """``dense``: the dense model's outputs for the held-out batches that allocations are judged on."""

    model: InstrumentedModel
    decisions: list[Decision]
    dense: list[Any]


def prepare(problem: Problem, model: InstrumentedModel, options: Options) -> Generator[str, None, Prepared]:
    """In stages "gradients" and "decompose"; appends to ``problem.skips`` what stays dense at any budget."""
    assert problem.holdout is not None
    units = units_of(problem.layout, shared=options.shared)
    units = [unit for unit in units if problem.calibrated(unit, 1) and _varied(problem, unit)]
    yield "gradients"
    mlps = eligible_mlps(problem.layout, units, options.kinds) if options.gates else []
    measured = list(dict.fromkeys([*units, *((mlp.gate,) for mlp in mlps if mlp.kind == "gated")]))
    batches, held = problem.holdout.batches, problem.holdout.held
    measure = functools.partial(sensitivities, model, problem.layout, measured, steps=problem.steps)
    found = measure(batches, held=held) if options.weighted else Sensitivity()
    if found.missing:
        alike = "errors of all layers count alike" if not found.moments else "there errors count as on average"
        problem.note(f"what errors do to the output could not be measured everywhere, so {alike}: {found.missing}")
    yield "decompose"
    decisions = make_decisions(options, problem, units, found)
    return Prepared(model, decisions, [compared(model.run(batch)) for batch in held])


def _varied(problem: Problem, unit: Unit) -> bool:
    """Whether the unit's input differs from token to token; otherwise it stays dense, with the reason in ``skips``."""
    rows = problem.rows(unit[0])
    if not bool(rows.any()):
        reason = "its input is zero throughout the calibration text: it stays dense"
    elif bool((rows == rows[0]).all()):
        reason = f"its input is the same for all {len(rows)} calibration tokens: it stays dense"
    else:
        return True
    problem.skips += [Skip(name, reason) for name in unit]
    return False
