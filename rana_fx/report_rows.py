"""The rows of a report as text: by role and by layers in a few lines, or a line for every linear.

In: rows, one for each weight. Out: lines of text. A summary has the same number of lines for any depth, of at most 80 columns.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rana_fx.skips import is_too_few
from rana_fx.summary import COLUMNS, aligned, layer_of, shortened

MOST_ROLES = 6
MOST_RANGES = 5  # of layers
FIRST = 3  # remarks that are named


@dataclass(frozen=True)
class Row:
    """One weight. ``action``: an adapter's kind ("rank", ...), "dense" or "skipped"; costs over the dense layer's."""

    site: str
    role: str
    op: str
    shape: tuple[int, ...]
    action: str
    detail: str
    flops: float
    bytes: float
    error: float | None
    masked_tokens: int = 0  # up to so many at once a masked kernel computes it; 0: a dense matmul
    kernel: str = ""  # the implementation of that kernel
    slower: str = ""  # why it is not the fastest of this device

    @property
    def adapted(self) -> bool:
        """Whether the plan replaces it."""
        return self.action not in ("dense", "skipped")

    @property
    def size(self) -> int:
        """Number of weights; 0 where the matrix is not known."""
        return self.shape[0] * self.shape[1] if self.shape else 0


def by_role(rows: Sequence[Row]) -> list[str]:
    """A line for each role: linears, how many are adapted, kinds, and costs over dense, by size."""
    lines = []
    for role, found in _limited(_grouped(rows, lambda row: row.role.replace("_", " ")), MOST_ROLES):
        kinds = ", ".join(dict.fromkeys(row.action for row in found if row.adapted)) or "-"
        counts = str(len(found)), str(sum(row.adapted for row in found))
        lines.append((role, *counts, _mean(found, "flops"), _mean(found, "bytes"), kinds))
    return (
        [shortened(line) for line in aligned(("role", "linears", "adapted", "flops", "bytes", "kinds"), lines)] if lines else []
    )


def by_layers(rows: Sequence[Row], metric: str) -> list[str]:
    """A line for each role, a column for each range of layers: cost over dense in ``metric``; no line for a single layer."""
    ranges = layer_ranges([layer_of(row.site) for row in rows if row.shape])
    if len(ranges) < 2:
        return []
    lines = []
    for role, found in _limited(_grouped([row for row in rows if row.shape], lambda row: row.role.replace("_", " ")), MOST_ROLES):
        cells = [_mean([row for row in found if layer_of(row.site) in layers], metric) for layers in ranges.values()]
        lines.append((role, *cells))
    return [shortened(line) for line in aligned((f"{metric} in layers", *ranges), lines)]


def left_dense(rows: Sequence[Row]) -> list[str]:
    """How many linears are not adapted, by reason: the most frequent ``FIRST`` reasons."""
    left = [row for row in rows if not row.adapted]
    reasons = sorted(_grouped(left, lambda row: row.detail).items(), key=lambda item: -len(item[1]))
    if not left:
        return []
    lines = [f"{len(left)} not adapted" + (f", the first {FIRST} of {len(reasons)} reasons:" if len(reasons) > FIRST else ":")]
    for reason, found in reasons[:FIRST]:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        lines.append(shortened(f"  {found[0].site}{more}: {reason}"))
    return lines


def too_few_tokens(details: Iterable[tuple[str, str]]) -> list[str]:
    """A line with the number of linears whose remark is that they saw too few tokens, and one with the first; none without."""
    found = [(site, text) for site, text in details if is_too_few(text)]
    if not found:
        return []
    return [
        f"{len(found)} linears saw too few calibration tokens: pass more text (--tokens)",
        shortened(f"  the first: {found[0][0]}: {found[0][1]}"),
    ]


def counted_remarks(texts: Sequence[str]) -> list[str]:
    """The number of remarks, and the first ``FIRST`` of them; none without."""
    if not texts:
        return []
    head = f"{len(texts)} remark{'s' if len(texts) > 1 else ''}" + (f", the first {FIRST}:" if len(texts) > FIRST else ":")
    most = 6 // min(len(texts), FIRST)
    return [head, *(line for text in texts[:FIRST] for line in wrapped(f"  note: {text}", most=most))]


def kernels(rows: Sequence[Row]) -> list[str]:
    """How many adapted linears run as masked kernels, which, and up to how many tokens; none where nothing is adapted. Then, for
    the most frequent reason, how many do not run in the device's fastest kernel.
    """
    found = [row for row in rows if row.adapted]
    masked = [row for row in found if row.masked_tokens]
    if not found:
        return []
    if not masked:
        return wrapped("no masked kernel is expected to be faster on this device: dense matmuls on masked inputs")
    tokens = [row.masked_tokens for row in masked]
    most = str(max(tokens)) if min(tokens) == max(tokens) else f"{min(tokens)} to {max(tokens)}"
    named = Counter(row.kernel for row in masked if row.kernel).most_common()
    names = f" ({', '.join(f'{name} {count}' for name, count in named)})" if named else ""
    lines = wrapped(
        f"{len(masked)} of {len(found)} adapted linears run as masked kernels{names}, for up to {most} tokens at once"
    )
    slower = Counter(row.slower for row in masked if row.slower).most_common(1)
    for reason, count in slower:
        lines += wrapped(f"{count} of them not in the fastest kernel of this device, {reason}")
    return lines


def wrapped(text: str, *, most: int = 3) -> list[str]:
    """A text on at most so many lines; it begins with the indentation of the first."""
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(
        text, COLUMNS, subsequent_indent=indent, max_lines=most, placeholder=" ...", break_long_words=True, break_on_hyphens=False
    )


def every_row(rows: Sequence[Row]) -> list[str]:
    """A line for each linear, as wide as it needs to be."""
    width = max((len(row.site) for row in rows), default=0)
    shapes = ["x".join(map(str, row.shape)) for row in rows]
    return [
        f"  {row.site:{width}}  {row.role:13}  {shape:>12}  {row.action:7}  {row.flops:6.3f}  {row.detail}"
        for row, shape in zip(rows, shapes, strict=True)
    ]


def layer_ranges(layers: Iterable[int | None], *, most: int = MOST_RANGES) -> dict[str, set[int | None]]:
    """Title ("0-5", "none" for linears in no layer) -> the layers of at most ``most`` ranges of neighbours, and those of none."""
    numbers = sorted({layer for layer in layers if layer is not None})
    size = -(-len(numbers) // most) or 1
    found: dict[str, set[int | None]] = {}
    for first in range(0, len(numbers), size):
        some = numbers[first : first + size]
        found[str(some[0]) if len(some) == 1 else f"{some[0]}-{some[-1]}"] = set(some)
    return found | ({"none": {None}} if None in set(layers) else {})


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _limited(groups: dict[str, list[Row]], most: int) -> list[tuple[str, list[Row]]]:
    """The largest groups by number of weights, in order of execution, the rest as one."""
    kept = sorted(groups, key=lambda name: -sum(row.size for row in groups[name]))[:most]
    rest = [row for name, found in groups.items() if name not in kept for row in found]
    return [(name, groups[name]) for name in groups if name in kept] + ([("other roles", rest)] if rest else [])


def _mean(rows: Sequence[Row], metric: str) -> str:
    size = sum(row.size for row in rows)
    return f"{sum(row.size * getattr(row, metric) for row in rows) / size:.3f}" if size else "-"
