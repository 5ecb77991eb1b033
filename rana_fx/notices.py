"""Warnings of parts of a plan that are not applied: one ``RanaWarning`` per cause and process, or an error under ``strict``.

In: places (the name of a linear, or of a node) and reasons. Out: one warning for each reason, with the first place, the number of
further ones and what to do. A cause is warned of once, whatever the filters of ``warnings`` are.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable

from rana_fx.errors import NotApplied, RanaWarning

_lock = threading.Lock()
_warned: set[str] = set()


def warn_once(cause: str, text: str) -> None:
    """Emit ``text`` as a ``RanaWarning`` unless ``cause`` was warned of in this process. Thread-safe."""
    with _lock:
        if cause in _warned:
            return
        _warned.add(cause)
    warnings.warn(text, RanaWarning, stacklevel=2)


def report(places: Iterable[tuple[str, str]], todo: str, *, strict: bool = False) -> None:
    """Warn of places where the plan is not applied, once for each reason.

    Args:
        places: (name of the linear, reason).
        todo: what a user can do, a sentence.
        strict: raise for the first place instead.

    Raises:
        NotApplied: under ``strict``, for the first place.
    """
    gathered: dict[str, list[str]] = {}
    for place, reason in places:
        if strict:
            raise NotApplied(site=place, reason=reason, todo=todo)
        names = gathered.setdefault(reason, [])
        if place not in names:
            names.append(place)
    for reason, names in gathered.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        warn_once(reason, NotApplied.message.format(site=names[0] + more, reason=reason, todo=todo))


def reset() -> None:
    """Clear the record of causes, so that each is warned of again."""
    with _lock:
        _warned.clear()
