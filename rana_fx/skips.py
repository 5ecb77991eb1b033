"""What adaptation leaves as it is, and what a user should know of the rest: the two kinds of entries in a plan's list.

On disk and in digests both are pairs of a site and a text; the site of a note begins with ``MARK``.
"""

from __future__ import annotations

from dataclasses import dataclass

MARK = "*"


@dataclass(frozen=True)
class Skip:
    """A weight or a group that is left as it is, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class Note:
    """A remark on a site that is adapted, or with an empty ``site`` on the whole plan."""

    site: str
    text: str

    @property
    def reason(self) -> str:
        """The text, by the name that it has in a ``Skip``."""
        return self.text


def stored(entry: Skip | Note) -> dict[str, str]:
    """As it is written to a plan."""
    return {"site": entry.site if isinstance(entry, Skip) else MARK + entry.site, "reason": entry.reason}


def entry(site: str, reason: str) -> Skip | Note:
    """What was written to a plan, or collected by a recipe, as a site and a text."""
    return Note(site.removeprefix(MARK), reason) if site.startswith(MARK) else Skip(site, reason)


def typed(given: Skip | Note) -> Skip | Note:
    """The same, as a ``Note`` where it is a ``Skip`` whose site is marked as a note's."""
    return entry(given.site, given.reason) if isinstance(given, Skip) else given
