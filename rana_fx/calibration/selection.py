"""Which linears a recipe may adapt: ``skip`` and ``only``, patterns of names.

In: patterns as ``fnmatch`` has them, and the names of linears. A pattern matches a linear where it matches the name of its weight
("model.layers.0.mlp.down_proj.weight") or of a module around it ("*.mlp.down_proj", "model.layers.0", "*.self_attn"). Out: a
layout in which the others are left to themselves, and the reasons; a pattern that matches nothing is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from rana_fx.calibration.layout import Layout
from rana_fx.errors import InvalidOption, NoSuchLinear
from rana_fx.skips import Skip

Patterns = str | Iterable[str]


@dataclass(frozen=True)
class Selection:
    """``skip``: linears that match one of these stay dense. ``only``: unless empty, so do those that match none of these."""

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @classmethod
    def of(cls, skip: Patterns = (), only: Patterns = ()) -> Selection:
        """From one pattern or several. Raises InvalidOption."""
        return cls(_patterns("skip", skip), _patterns("only", only))

    def __bool__(self) -> bool:
        return bool(self.skip or self.only)

    def reason(self, name: str) -> str | None:
        """Why a linear is left dense, or None where it may be adapted."""
        found = next((pattern for pattern in self.skip if matches(name, pattern)), None)
        if found is not None:
            return f"left dense by skip={found!r}"
        if self.only and not any(matches(name, pattern) for pattern in self.only):
            return f"left dense: it matches no pattern of only={', '.join(map(repr, self.only))}"
        return None

    def check(self, names: Collection[str], model: str) -> None:
        """Raises NoSuchLinear where a pattern matches none of the names, or all together leave nothing to adapt."""
        for option, patterns in (("skip", self.skip), ("only", self.only)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in names):
                    raise NoSuchLinear(option=option, pattern=pattern, model=model, near=_near(pattern, names))
        if self and names and all(self.reason(name) is not None for name in names):
            given = ", ".join(self.skip or self.only)
            raise InvalidOption(name="skip" if self.skip else "only", got=given, expected="patterns that leave a linear to adapt")

    def applied(self, layout: Layout) -> Layout:
        """The layout with all other linears left to themselves: a budget of it does not count them."""
        if not self:
            return layout
        sites = {
            name: site if self.reason(name) is None or not site.counted else replace(site, left=True)
            for name, site in layout.sites.items()
        }
        blocks = tuple(block for block in layout.blocks if all(sites[name].counted for name in block.sites))
        return replace(layout, sites=sites, blocks=blocks)

    def skips(self, layout: Layout) -> list[Skip]:
        """A skip with the reason for every linear of the budget that is left dense."""
        reasons = {name: self.reason(name) for name, site in layout.sites.items() if site.counted}
        return [Skip(name, reason) for name, reason in reasons.items() if reason is not None]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches the name of a weight or of a module around it."""
    return any(fnmatchcase(one, pattern) for one in _around(name))


def _around(name: str) -> list[str]:
    """The name itself and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _near(pattern: str, names: Iterable[str]) -> str:
    """What may have been meant: ends of names, or whole names of modules, that look like the pattern."""
    start = "*." if pattern.startswith("*") else ""
    known: dict[str, None] = {}
    for name in names:
        for one in _around(name):
            parts = one.split(".")
            ends = [".".join(parts[first:]) for first in range(len(parts))] if start else [one]
            known |= dict.fromkeys(end for end in ends if not end.isdigit())
    close = difflib.get_close_matches(pattern.removeprefix("*").removeprefix("."), list(known), n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(start + one) for one in close) + "?"
    return "some are: " + ", ".join(list(names)[:3])


def _patterns(option: str, given: Patterns) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(pattern, str) and pattern for pattern in found):
        raise InvalidOption(name=option, got=given, expected="a pattern of names such as '*.down_proj', or several")
    return found
