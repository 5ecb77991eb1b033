"""What a command prints: short by default, nothing with --quiet.

In: tables and lines. Out: text on stdout. A summary of a model of any depth fits on 40 lines of 80 columns.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import typer

from rana_fx.commands.record import cell, show
from rana_fx.summary import COLUMNS, aligned, shortened

LEGEND = (
    "flops, bytes: expected cost of a token over the dense linears' (0.6: 60 % of the",
    "multiply-adds, or of the weight bytes). kept: of ranks, inputs or neurons.",
)


@dataclass(frozen=True)
class Screen:
    """``quiet``: nothing is printed."""

    quiet: bool = False

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, notes: Iterable[str] = ()) -> None:
        """A table as wide as it needs to be."""
        if not self.quiet:
            show(title, columns, rows, notes=notes)

    def summary(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table of short cells, in 80 columns."""
        if not self.quiet:
            self.lines([title, *aligned(columns, [[brief(value) for value in row] for row in rows])])

    def facts(self, title: str, rows: Iterable[tuple[str, object]]) -> None:
        """A name and a value a line, in 80 columns: what does not fit goes on below."""
        found = [(name, cell(value)) for name, value in rows]
        width = max((len(name) for name, _ in found), default=0)
        self.lines([title])
        for name, value in found:
            indent = " " * (width + 4)
            self.lines(textwrap.wrap(value, COLUMNS, initial_indent=f"  {name:{width}}  ", subsequent_indent=indent), whole=True)

    def wrapped(self, text: str, *, indent: str = "", most: int | None = None) -> None:
        """A text as lines of 80 columns. ``most``: lines; what is left out is shown by dots."""
        self.lines(textwrap.wrap(text, COLUMNS, subsequent_indent=indent, max_lines=most, placeholder=" ..."), whole=True)

    def lines(self, lines: Iterable[str], *, whole: bool = False) -> None:
        """Lines, shortened to 80 columns unless ``whole``."""
        for line in () if self.quiet else lines:
            typer.echo(line if whole else shortened(line))

    def next_steps(self, *steps: tuple[str, str]) -> None:
        """(command, what it shows) of what to do next. A command is never shortened: it is there to be copied."""
        for index, (command, what) in enumerate(steps):
            line = f"{'' if index else 'next:':5} {command}"
            explained = f"{line}  # {what}"
            self.lines([explained if len(explained) <= COLUMNS else line], whole=True)


def brief(value: object) -> str:
    """A value for a narrow column."""
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 1000 else cell(value)
