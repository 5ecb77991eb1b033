"""Progress of work in stages, from start to end: one bar, one callback, one logger, and an estimate of the time that is left.

In: the stages of a piece of work with the share of its time that each is expected to take, and a call for each step. Out: a
``Step`` for each of these to a callback, by default one that draws a bar on stderr; and a line in the log ("rana_fx.progress",
level INFO) when a stage begins and when it ends. Shares need only be roughly right: the estimate scales them by the time that
has passed.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_AHEAD = 8  # steps that a stage of unknown length is taken to have left
_REDRAWN_S = 0.1  # seconds between two drawings on a terminal
_LOGGED_S = 10.0  # and in a file, where each is a line


@dataclass(frozen=True)
class Step:
    """Where the work stands.

    Attributes:
        stage: its name, such as "calibrate". index: its number, from 1. stages: how many there are.
        done, total: steps of the stage; ``total`` is None where it is not known.
        fraction: of the whole work that is done, by expected time, in [0, 1]; it never falls.
        elapsed_s: seconds since the start. left_s: seconds that are expected to be left; None before anything is done.
    """

    stage: str
    index: int
    stages: int
    done: int
    total: int | None
    fraction: float
    elapsed_s: float
    left_s: float | None


Callback = Callable[[Step], None]


@dataclass(eq=False)
class Progress:
    """Counts steps and tells ``tell`` of each. False as a bool where nobody is told.

    ``shares``: expected seconds, or any multiple of them, by stage, in order.
    """

    tell: Callback | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    title: str = ""
    _stage: str = ""
    _done: int = 0
    _total: int | None = None
    _known: tuple[str, int, int | None] | None = None  # around a stage without a share: the one that it is part of
    _past: list[float] = field(default_factory=list)  # shares of the stages that ended
    _fraction: float = 0.0
    _started: float = field(default_factory=lambda: time.perf_counter())

    def __bool__(self) -> bool:
        return self.tell is not None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the work, or without a share of its own a part of the stage around it."""
        before, began = (self._stage, self._done, self._total, self._known), time.perf_counter()
        if name in self.shares or not self._stage:
            self._known = None
        elif self._known is None:
            self._known = before[:3]
        self._stage, self._done, self._total = name, 0, None
        _log.info("%s: %s", self.title, name)
        self._report()
        try:
            yield
            _log.info("%s: %s took %.1f s", self.title, name, time.perf_counter() - began)
            self._past.append(self.shares.get(name, 0.0))
        finally:  # a search goes on after a budget that cannot be reached
            self._stage, self._done, self._total, self._known = before
        if not self._stage:
            self._report(name)

    def expect(self, total: int) -> None:
        """The number of steps of the current stage, as far as it is known."""
        self._total = total

    def advance(self) -> None:
        """One step of the current stage is done."""
        self._done += 1
        self._report()

    def each(self, items: Iterable[_T]) -> Iterator[_T]:
        """The items, each a step of the current stage."""
        if isinstance(items, Sized):
            with suppress(TypeError):  # a DataLoader of an iterable dataset
                self.expect(len(items))
        for item in items:
            yield item
            self.advance()

    def _report(self, ended: str = "") -> None:
        if self.tell is None:
            return
        # fsum does not depend on the order: at the end the fraction is 1
        whole = math.fsum(self.shares.values()) or 1.0
        known, done, total = self._known or (self._stage, self._done, self._total)
        total = done + _AHEAD if total is None else max(1, total)
        inside = self.shares.get(known, 0.0) * min(1.0, done / total)
        self._fraction = max(self._fraction, min(1.0, math.fsum([*self._past, inside]) / whole))
        elapsed = time.perf_counter() - self._started
        left = elapsed * (1 - self._fraction) / self._fraction if self._fraction > 0 else None
        names = list(self.shares)
        index = names.index(known or ended) + 1 if (known or ended) in names else max(1, len(names))
        self.tell(Step(self._stage or ended, index, max(1, len(names)), self._done, self._total, self._fraction, elapsed, left))


class Bar:
    """A callback that draws one bar on stderr: stage, percent, time passed, time left. Close it at the end."""

    def __init__(self, title: str) -> None:
        from tqdm.auto import tqdm

        terminal = sys.stderr.isatty()
        self._title = title
        self._bar: tqdm = tqdm(
            total=100.0,
            desc=title,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}",
            ncols=None if terminal else 80,
            dynamic_ncols=terminal,
            mininterval=_REDRAWN_S if terminal else _LOGGED_S,
        )
        self._drawn = 0.0

    def __call__(self, step: Step) -> None:
        self._bar.n = 100 * step.fraction
        self._bar.set_description_str(f"{self._title} {step.index}/{step.stages} {step.stage}", refresh=False)
        self._bar.set_postfix_str("" if step.left_s is None else f"{clock(step.left_s)} left", refresh=False)
        now = time.perf_counter()
        if now - self._drawn >= self._bar.mininterval or step.fraction == 1:
            self._drawn = now
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is, and start a new line."""
        self._bar.close()


@contextmanager
def following(given: bool | Callback | Progress, *, title: str, shares: Mapping[str, float]) -> Iterator[Progress]:
    """Progress of work with these stages: a bar (True), nothing (False), a callback of the caller, or part of other work."""
    if isinstance(given, Progress):
        yield given
    elif given is True:
        bar = Bar(title)
        try:
            yield Progress(bar, shares, title)
        finally:
            bar.close()
    else:
        yield Progress(given or None, shares, title)


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours, minutes and seconds: "1:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
