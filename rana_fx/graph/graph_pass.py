"""What every step that changes or checks a graph is: a ``Pass``, and what it returns.

    def remove_identities(graph_module, context) -> PassResult: ...

In: a graph module, changed in place, and a context: what the passes of one tuple need beside the graph. Out: how many places
were changed, and for each place that looked like one but was left alone, why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from torch import fx

Context = TypeVar("Context", contravariant=True)


class Declined(NamedTuple):
    """A place that a pass left as it was. ``where``: the name of a node, or of a linear."""

    where: str
    reason: str


class Intended(Declined):
    """A place left unchanged on purpose, because of an option or the plan: no warning is emitted."""

    __slots__ = ()


class Outdated(Declined):
    """A linear whose weight is not the one that the plan was made for, or has changed since the plan was attached."""

    __slots__ = ()


@dataclass(frozen=True)
class PassResult:
    """How many places a pass changed, and which it declined. A pass that only checks changes none, and raises."""

    count: int = 0
    declined: tuple[Declined, ...] = ()


class Pass(Protocol[Context]):
    """A function over (graph module, context). Its name is how results, dumps and errors name it."""

    @property
    def __name__(self) -> str: ...

    def __call__(self, graph_module: fx.GraphModule, context: Context, /) -> PassResult: ...
