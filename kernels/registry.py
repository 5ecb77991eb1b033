"""Which implementation computes an operation: a table of rows per operation, in order of preference.

In: a ``Problem`` (problem.py). Out: an ``Implementation``, the first row that is for the device, accepts the problem and is not
expected to be slower than the last row. That is the reference, which takes everything and, compiled, is a dense matmul. Every row
that was passed over gives its reason (``why``).

A backend is a module with a tuple ``ROWS`` and its name in ``BUILT_IN``, or, outside of this package, calls of
``register_implementation``. Rows name launchers and lowerings as "module:function", so that Triton and Inductor are imported when
they are first needed, or give the functions themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rana_fx.errors import InvalidOption, UnknownChoice
from rana_fx.kernels import cost
from rana_fx.kernels.problem import DTYPES, Problem, bits_of
from rana_fx.kernels.triton.config import MAX_TOKENS, TOKENS_AT_ONCE

FUSED = ("masked_gemv_add", "masked_gemv_gated", "masked_gemv_normed", "masked_gemv_parts", "normed_router")
OPERATIONS = ("masked_gemv", "router", "masked_rows", *FUSED)
BUILT_IN = (
    "rana_fx.kernels.cuda.implementations",
    "rana_fx.kernels.cuda.router_implementations",
    "rana_fx.kernels.triton.implementations",
    "rana_fx.kernels.cpp.implementations",
)
REFERENCE = "reference"


def _no_reason(problem: Problem) -> str | None:  # noqa: ARG001
    return None


def _no_estimate(problem: Problem) -> float | None:  # noqa: ARG001
    return None


@dataclass(frozen=True)
class Implementation:
    """A row of the table.

    Attributes:
        op: the operation's name, without "rana::".
        name: by which ``ops.implementation`` chooses it.
        device: the type of device it is for; None for any.
        accepts: why it cannot compute a problem, or None.
        slower: why the reference is expected to be faster although it could, or None. Not called where it was chosen by name.
        cost: microseconds that are expected, or None without an estimate. A row that takes no less than the reference is slower.
        launch: computes in eager mode. Takes the operation's arguments in their order, ``density`` left out.
        lower: computes in Inductor's IR. Takes the problem and the same arguments, of activations all leading dimensions in one;
            returns (tokens, columns) in any floating dtype.
    """

    op: str
    name: str
    device: str | None = None
    accepts: Callable[[Problem], str | None] = _no_reason
    slower: Callable[[Problem], str | None] = _no_reason
    cost: Callable[[Problem], float | None] = _no_estimate
    launch: str | Callable[..., Any] | None = None
    lower: str | Callable[..., Any] | None = None

    def code(self, *, compiled: bool) -> Callable[..., Any]:
        """The lowering or the launcher, imported where it is named."""
        given = self.lower if compiled else self.launch
        if isinstance(given, str):
            module, _, name = given.partition(":")
            given = getattr(importlib.import_module(module), name)
        assert callable(given)
        return given


def register_implementation(row: Implementation, *, before: str | None = None) -> Callable[[], None]:
    """Add a row in front of all others of its operation, or of those called ``before``.

    Returns:
        A function that takes the row out again.

    Raises:
        UnknownChoice: the operation, or ``before``.
        InvalidOption: the name is "auto" or one that the operation has for this device, or the row computes nothing.
    """
    rows = _rows_of(row.op)
    if row.name == "auto" or any(row.name == other.name and row.device == other.device for other in rows):
        raise InvalidOption(name="name", got=row.name, expected=f"a name that no implementation of {row.op} has yet")
    if row.launch is None and row.lower is None:
        raise InvalidOption(name="launch", got=None, expected="a launcher, or else a lowering")
    names = [other.name for other in rows]
    if before is not None and before not in names:
        raise UnknownChoice(kind="before", got=before, valid=", ".join(dict.fromkeys(names)))
    rows.insert(0 if before is None else names.index(before), row)

    def unregister() -> None:
        with contextlib.suppress(ValueError):
            rows.remove(row)

    return unregister


def implementations(op: str) -> tuple[Implementation, ...]:
    """Rows of an operation in order of preference, the reference last. Raises UnknownChoice."""
    return tuple(_rows_of(op))


def launchable() -> tuple[str, ...]:
    """Names of implementations that can be launched in eager mode, sorted."""
    return tuple(sorted({row.name for rows in _table().values() for row in rows if row.launch is not None}))


def choose(problem: Problem, *, name: str | None = None) -> Implementation:
    """The implementation of a problem. Raises UnknownChoice for another operation.

    Args:
        name: of the one to take where it accepts the problem, on any device and however slow; elsewhere it is the reference.
    """
    *rows, last = _rows_of(problem.op)
    if name is None:
        return next((row for row in rows if _refusal(row, last, problem) is None), last)
    return next((row for row in rows if row.name == name and _unable(row, problem) is None), last)


def why(problem: Problem) -> list[tuple[Implementation, str]]:
    """The implementations that ``choose`` passes over before it comes to one, in order, each with the reason."""
    *rows, last = _rows_of(problem.op)
    found: list[tuple[Implementation, str]] = []
    for row in rows:
        reason = _refusal(row, last, problem)
        if reason is None:
            break
        found.append((row, reason))
    return found


def tokens_skipped(rows: int, columns: int, density: float, stored: torch.dtype, device: torch.device) -> int:
    """Up to how many tokens at once skipping rows is expected to be faster than a dense matmul, compiled.

    Args:
        rows, columns: of the matrix. density: the expected fraction of rows that a token keeps. stored: the dtype of the weight's
            memory; a floating one is the activations', too.

    Returns:
        At most MAX_TOKENS; 0 where it is not for one token.
    """
    # a dtype that no kernel computes in is estimated as float32
    stored = torch.float32 if stored.is_floating_point and stored not in DTYPES else stored
    dtype = stored if stored.is_floating_point else torch.float32
    problem = Problem("masked_gemv", device, dtype, 1, 1, rows, columns, stored, bits_of(stored), density=density)
    for tokens in range(1, MAX_TOKENS + 1):
        if choose(dataclasses.replace(problem, tokens=tokens, most_tokens=tokens)).name == REFERENCE:
            return tokens - 1
    return MAX_TOKENS


def tokens_fused(op: str, device: str) -> int:
    """Up to how many tokens share what one launch of a fused operation reads; 0 where the type of device has no such launch."""
    return TOKENS_AT_ONCE if any(row.device == device and row.lower is not None for row in _rows_of(op)) else 0


def fingerprint() -> str:
    """Names what was registered from outside, with the sources of its modules, since generated code depends on it; else ""."""
    built_in = _built_in()
    found = [
        (op, index, row.name, row.device, _sources_of(row))
        for op, rows in _table().items()
        for index, row in enumerate(rows)
        if row not in built_in[op]
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest() if found else ""


def _refusal(row: Implementation, last: Implementation, problem: Problem) -> str | None:
    """Why a row is not chosen, or None."""
    if row.device is not None and row.device != problem.device.type:
        return f"is for {row.device}, the operands are on {problem.device.type}"
    reason = _unable(row, problem) or row.slower(problem)
    if reason is not None:
        return reason
    us = row.cost(problem)
    dense_us = None if us is None else last.cost(problem)
    if us is None or dense_us is None or us < dense_us:
        return None
    return f"{us:.1f} us expected at density {problem.density:.2f}, {dense_us:.1f} us of a dense matmul"


def _unable(row: Implementation, problem: Problem) -> str | None:
    if (row.lower if problem.compiled else row.launch) is None:
        return "has no lowering" if problem.compiled else "has no launcher for eager mode"
    return row.accepts(problem)


def _dense_us(problem: Problem) -> float | None:
    """Of the reference, compiled for a GPU. In eager mode it is more than a matmul; on other devices nothing was measured."""
    if not problem.compiled or problem.device.type != "cuda":
        return None
    rows, columns, _ = problem.sizes
    # a masked input is written to memory by a launch of its own; what is pointwise behind a matmul is one either way
    launches = 2 if problem.op.startswith("masked_gemv") else 1
    return cost.dense_us(rows, columns, cost.nearest(problem.device), bits=problem.bits, launches=launches)


def _reference_of(op: str) -> Implementation:
    return Implementation(
        op, REFERENCE, cost=_dense_us, launch=f"rana_fx.kernels.reference:{op}", lower=f"rana_fx.passes.lower_dense:{op}"
    )


@functools.cache
def _built_in() -> dict[str, tuple[Implementation, ...]]:
    rows = [row for module in BUILT_IN for row in importlib.import_module(module).ROWS]
    return {op: (*(row for row in rows if row.op == op), _reference_of(op)) for op in OPERATIONS}


@functools.cache
def _table() -> dict[str, list[Implementation]]:
    return {op: list(rows) for op, rows in _built_in().items()}


def _rows_of(op: str) -> list[Implementation]:
    if op not in OPERATIONS:
        raise UnknownChoice(kind="operation", got=op, valid=", ".join(OPERATIONS))
    return _table()[op]


def _sources_of(row: Implementation) -> list[str]:
    """The text of every file that a row's functions are from."""
    files = set()
    for part in (row.accepts, row.slower, row.cost, row.launch, row.lower):
        if isinstance(part, str):
            spec = importlib.util.find_spec(part.partition(":")[0])
            files.add(None if spec is None else spec.origin)
        elif part is not None:
            files.add(inspect.getsourcefile(_function_of(part)))
    return [Path(file).read_text() for file in sorted(file for file in files if file is not None)]


def _function_of(part: Any) -> Any:
    while isinstance(part, functools.partial):
        part = part.func
    return inspect.unwrap(part) if inspect.isroutine(part) else type(part)
