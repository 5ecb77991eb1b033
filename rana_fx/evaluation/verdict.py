"""A comparison as text: a table of two columns, quality, and in words what is gained, or that nothing is and why.

In: a ``Comparison``. Out: lines of at most 80 columns.
"""

from __future__ import annotations

import textwrap

from rana_fx.curve import Interval
from rana_fx.evaluation.compare import Comparison, Side
from rana_fx.evaluation.decoding import ROUNDS
from rana_fx.recipes.intervals import LEAST
from rana_fx.summary import COLUMNS, aligned, shortened

_NAMED = 2  # adapters


def lines(found: Comparison) -> list[str]:
    """The whole comparison, in about a dozen lines."""
    title = f"{found.model} on {found.device}, {found.dtype}; plan {found.plan} ({found.recipe}, budget {found.budget:g})"
    rows = [(name, *(text(side) for side in (found.dense, found.adapted))) for name, text in _ROWS]
    about = f"{found.documents} documents, {found.tokens:,} tokens; a prompt of {found.prompt_tokens}; mode {found.mode}."
    paragraphs = (f"{quality(found)} {about}", gain(found), *(() if found.faster else (why(found),)))
    wrapped = [line for text in paragraphs for line in textwrap.wrap(text, COLUMNS)]
    return [shortened(title), *aligned(("", "dense", "adapted"), rows), *wrapped]


def quality(found: Comparison) -> str:
    """Divergence, agreement and increase of the perplexity, with intervals."""
    if found.kl is None or found.agreement is None:
        return f"No intervals: {LEAST} documents are needed, and logits."
    text = f"KL {_span(found.kl, '.4f')} nats a token, same greedy token {_span(found.agreement, '.1%')}"
    if found.perplexity is not None:
        text += f", perplexity {_span(found.perplexity, '+.3f')}"
    return text + "; 95 % intervals."


def gain(found: Comparison) -> str:
    """One sentence on speed."""
    ratio, rounds = found.speedup, f"{found.speedup.low:.2f} to {found.speedup.high:.2f} in {ROUNDS} rounds"
    cost = ""
    if found.adapted.perplexity is not None and found.dense.perplexity is not None:
        cost = f", for {found.adapted.perplexity / found.dense.perplexity - 1:+.1%} perplexity"
    if found.faster:
        return f"Gained: a token is decoded {ratio.mean:.2f} times as fast ({rounds}){cost}."
    if found.faster is None:
        return f"No gain that can be told from noise: {ratio.mean:.2f} times as fast ({rounds}){cost}."
    return f"Nothing is gained: decoding is slower, {ratio.mean:.2f} times as fast ({rounds}){cost}."


def why(found: Comparison) -> str:
    """What decides: on a GPU launches, elsewhere how many weights a token need not read."""
    dense, adapted = found.dense.read_bytes, found.adapted.read_bytes
    reads = f"a token is expected to read {adapted / 1e6:.1f} MB of weights instead of {dense / 1e6:.1f}"
    reads += f", which allows {dense / adapted:.2f} times the speed at most" if adapted < dense else ", which saves none"
    if found.expected_ms is not None:
        text = (
            f"Why: {reads}; this GPU is expected to take {found.expected_ms[1]:.2f} ms a token, dense {found.expected_ms[0]:.2f}"
        )
        if found.slower:
            more = f" and {len(found.slower) - _NAMED} more" if len(found.slower) > _NAMED else ""
            text += (
                f"; {len(found.slower)} of {found.adapters} adapters take longer than the linears they replace"
                f" ({', '.join(found.slower[:_NAMED])}{more}): products this small are bound by launches"
            )
        return text + "."
    text = f"Why: {reads}"
    if found.unmasked:
        text += f"; {found.unmasked} of {found.adapters} adapters have no masked kernel that is faster here, and run dense"
    return text + "; attention, norms, cache and calls take the same time in both."


def _ms(value: float) -> str:
    return f"{value:.2f}"


def _mb(value: float) -> str:
    return f"{value / 1e6:,.1f}"


def _span(found: Interval, form: str) -> str:
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def _perplexity(side: Side) -> str:
    return "-" if side.perplexity is None else f"{side.perplexity:.3f}"


_ROWS = (
    ("perplexity", _perplexity),
    ("ms a decoded token", lambda side: _ms(side.ms_per_token)),
    ("ms to the first token", lambda side: _ms(side.first_token_ms)),
    ("weights in memory, MB", lambda side: _mb(side.memory_bytes)),
    ("weights read by a token, MB", lambda side: _mb(side.read_bytes)),
    ("compilation, s", lambda side: f"{side.compile_s:.1f}"),
)
