"""The two kinds of entries in a plan's list: weights that stay dense, with the reason, and notes on adapted ones.

On disk and in digests both are pairs of a site and a text; the site of a note begins with ``MARK``.
"""

from __future__ import annotations

from dataclasses import dataclass

MARK = "*"
TOO_FEW = "too few for"  # in the text of every entry that says so of tokens


def is_too_few(text: str) -> bool:
    """Whether a text says that a linear saw too few tokens."""
    return TOO_FEW in text


@dataclass(frozen=True)
class Skip:
    """A weight or a group that is not adapted, and the reason."""

    site: str
    reason: str


@dataclass(frozen=True)
class Note:
    """A remark on a site that is adapted, or with an empty ``site`` on the whole plan."""

    site: str
    text: str

    @property
    def reason(self) -> str:
        """The text, under the attribute name of a ``Skip``."""
        return self.text


def stored(entry: Skip | Note) -> dict[str, str]:
    """The entry as it is written to a plan."""
    return {"site": entry.site if isinstance(entry, Skip) else MARK + entry.site, "reason": entry.reason}


def entry(site: str, reason: str) -> Skip | Note:
    """The entry for a site and a text, as a plan stores them or a recipe collects them."""
    return Note(site.removeprefix(MARK), reason) if site.startswith(MARK) else Skip(site, reason)


def typed(given: Skip | Note) -> Skip | Note:
    """The same entry; a ``Skip`` whose site begins with ``MARK`` is converted to a ``Note``."""
    return entry(given.site, given.reason) if isinstance(given, Skip) else given
