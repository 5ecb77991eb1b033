"""Checks of arguments of a command before anything is loaded, torch included; each names what was probably meant.

In: the value of an argument, as a callback of typer. Out: the value, or an error. A name on the hub is looked up there, or in the
cache (hub_names.py); for a device other than the CPU torch is imported, and nothing else.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rana_fx.asked import asked_of, promise_of
from rana_fx.choices import METRICS, RECIPES, WITHOUT_BUDGET, WITHOUT_LOSS, builder_of
from rana_fx.commands import hub_names
from rana_fx.devices import known_device
from rana_fx.errors import (
    BudgetOutOfRange,
    DatasetError,
    InvalidOption,
    ModelError,
    PlanFileError,
    UnknownChoice,
    UnknownMetric,
    UnknownRecipe,
    one_of,
)

_CONFIGS = ("config.json", "adapter_config.json")
_HEADER = "plan.json"


def budget(value: float) -> float:
    """Raises BudgetOutOfRange."""
    if not 0 < value <= 1:
        raise BudgetOutOfRange(budget=value)
    return value


def budgets(value: str | None) -> str | None:
    """Numbers with commas. Raises BudgetOutOfRange, InvalidOption."""
    if value is not None:
        asked_of(None, numbers("--budgets", value), {})
    return value


def needed_budgets(value: str) -> str:
    """``budgets``, of an option that has a default."""
    budgets(value)
    return value


def target(name: str) -> Callable[[float | None], float | None]:
    """A callback that raises TargetNotPositive."""

    def check(value: float | None) -> float | None:
        if value is not None:
            promise_of({name: value})
        return value

    return check


def numbers(name: str, text: str) -> list[float]:
    """Of a list with commas. Raises InvalidOption."""
    try:
        return [float(part) for part in text.strip("[]").split(",")]
    except ValueError:
        raise InvalidOption(name=name, got=text, expected="numbers with commas, such as 0.3,0.5,0.7") from None


def recipe(value: str) -> str:
    """Raises UnknownRecipe."""
    if value not in RECIPES:
        raise UnknownRecipe(kind="recipe", got=value, valid=", ".join(RECIPES))
    return value


def recipe_with_budgets(value: str) -> None:
    """Of a command that is asked for several budgets, or a target. Raises InvalidOption."""
    if value in WITHOUT_BUDGET:
        expected = f"a recipe that takes a budget; of this one there is one plan, at no loss: rana-fx adapt --recipe {value}"
        raise InvalidOption(name="--recipe", got=value, expected=expected)


def recipe_to_refine(value: str) -> None:
    """Of a command that refines plans. Raises InvalidOption."""
    if value in WITHOUT_LOSS:
        expected = f"no refinement: recipe {value} approximates nothing, so there is nothing to train"
        raise InvalidOption(name="--refine", got=f"with --recipe {value}", expected=expected)


def metric(value: str) -> str:
    """Raises UnknownMetric."""
    if value not in METRICS:
        raise UnknownMetric(kind="metric", got=value, valid=", ".join(METRICS))
    return value


def choice(kind: str, valid: Sequence[str]) -> Callable[[str], str]:
    """A callback that raises UnknownChoice."""

    def check(value: str) -> str:
        if value not in valid:
            raise UnknownChoice(kind=kind, got=value, valid=", ".join(valid))
        return value

    return check


def option(name: str, valid: Sequence[str]) -> Callable[[str], str]:
    """A callback that raises InvalidOption."""

    def check(value: str) -> str:
        if value not in valid:
            raise InvalidOption(name=name, got=value, expected=one_of(value, valid))
        return value

    return check


def model(value: str) -> str:
    """A folder with a model in it, or what may be a name on the hub. Raises ModelError."""
    path = Path(value)
    reason = ""
    if path.is_dir():
        if not any((path / name).is_file() for name in _CONFIGS):
            reason = "the folder has no config.json" + _near(path, "config.json")
    elif path.exists():
        reason = "it is a file, not a folder"
    elif path.is_absolute() or value.startswith((".", "~")) or value.count("/") > 1:
        reason = "there is no such folder" + _near(path, "config.json")
    else:
        reason = hub_names.why_not(value)
    if reason:
        raise ModelError(source=value, reason=reason)
    return value


def plan(value: Path | None) -> Path | None:
    """A folder with a plan in it. Raises PlanFileError."""
    if value is not None:
        _check_plan(value)
    return value


def needed_plan(value: Path) -> Path:
    """``plan``, of an option that cannot be left out."""
    _check_plan(value)
    return value


def data(value: str) -> str:
    """A file or folder of text, or what may be a name on the hub. Raises DatasetError."""
    path = Path(value)
    there = path.exists()
    if not there and (path.is_absolute() or value.startswith((".", "~")) or builder_of(path) is not None):
        raise DatasetError(source=value, reason="there is no such file or folder" + _near(path))
    if there and path.is_file() and builder_of(path) is None:
        raise DatasetError(source=value, reason=f"files that end in {path.suffix or path.name!r} are not known")
    if not there:
        reason = hub_names.why_not(value.partition(":")[0], "dataset")
        if reason:
            raise DatasetError(source=value, reason=reason)
    return value


def device(value: str | None) -> str | None:
    """A device of this machine. torch is imported for others than the CPU, before anything is loaded. Raises InvalidOption."""
    if value not in (None, "cpu"):
        known_device(value)
    return value


def file(path: Path | None) -> Path | None:
    """A file to write, in a folder that can be made. Raises InvalidOption."""
    if path is None:
        return None
    if path.is_dir():  # so is an empty name
        raise InvalidOption(name="--json", got=str(path), expected="the name of a file, not of a folder")
    _check_writable("--json", path.parent)
    return path


def folder(path: Path) -> Path:
    """A folder to write to, or to make. Raises InvalidOption."""
    if path.exists() and not path.is_dir():
        raise InvalidOption(name="--out", got=str(path), expected="the name of a folder, not of a file")
    _check_writable("--out", path)
    return path


def _check_writable(name: str, place: Path) -> None:
    found = next((one for one in (place, *place.absolute().parents) if one.exists()), Path("/"))
    if not found.is_dir() or not os.access(found, os.W_OK | os.X_OK):
        why = "is not writable" if found.is_dir() else "is a file"
        raise InvalidOption(name=name, got=str(place), expected=f"a place that can be written: {found} {why}")


def _check_plan(path: Path) -> None:
    """Raises PlanFileError; what is in the files is checked when the plan is loaded."""
    if path.is_file():
        raise PlanFileError(path=path, reason="it is a file, not a folder")
    if not (path / _HEADER).exists():
        reason = f"there is no {_HEADER} in it" if path.is_dir() else "there is no such folder"
        raise PlanFileError(path=path, reason=reason + _near(path, _HEADER))


def _near(path: Path, holds: str = "") -> str:
    """ " (did you mean PATH?)": a neighbour of a similar name, or a folder in it, that has a file ``holds``; "" without one."""
    try:
        inside = [one for one in path.iterdir() if (one / holds).is_file()] if holds and path.is_dir() else []
        beside = [one for one in path.parent.iterdir() if not holds or (one / holds).is_file()] if path.parent.is_dir() else []
    except OSError:
        return ""
    if len(inside) == 1:
        return f" (did you mean {inside[0]}?)"
    return _close(path, beside)


def _close(path: Path, others: Iterable[Path]) -> str:
    named = {other.name: other for other in others if other.name != path.name}
    found = difflib.get_close_matches(path.name, list(named), n=1)
    return f" (did you mean {named[found[0]]}?)" if found else ""
