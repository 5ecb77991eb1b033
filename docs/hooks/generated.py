"""Parts of pages that are made from the code when the site is built: the command line from typer, errors from their classes.

In: a page with a marker, ``<!-- generated: NAME -->``. Out: the page with Markdown in its place.
"""

from __future__ import annotations

import inspect
import re
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def command_line() -> str:
    """All commands with their arguments and options, as ``typer ... utils docs`` writes them."""
    command = [sys.executable, "-m", "typer", "rana_fx.cli", "utils", "docs", "--name", "rana-fx"]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # the page has a title of its own
    written = written.partition("\n")[2]
    # typer escapes for HTML what stands in backticks
    for escaped, plain in (("&lt;", "<"), ("&gt;", ">"), ("&#x27;", "'"), ("&quot;", '"'), ("&amp;", "&")):
        written = written.replace(escaped, plain)
    return re.sub(r"\[default: ([^\]]*)\]", lambda found: f"[default: `{found[1]}`]", written)


def errors() -> str:
    """Every class of ``rana_fx.errors`` under the heading of its section, with its bases and the text of its message."""
    from rana_fx import errors as module

    source = inspect.getsource(module)
    lines = []
    for section, name in re.findall(r"^# ---- (.*)$|^class (\w+)\(", source, re.MULTILINE):
        if section:
            lines.append(f"## {section[0].upper()}{section[1:]}\n")
        elif lines and issubclass(getattr(module, name), module.RanaError):
            lines.append(_entry(getattr(module, name)))
    return "\n".join(lines)


def _entry(error: Any) -> str:
    bases = ", ".join(f"`{base.__name__}`" for base in error.__mro__[1:] if base not in (Exception, BaseException, object))
    pieces = string.Formatter().parse(error.message)
    text = "".join(re.sub(r"([\\*_\[\]<`])", r"\\\1", before) + (f"*{name}*" if name else "") for before, name, _, _ in pieces)
    return f"### {error.__name__}\n\nIs a {bases}.\n\n> {text}\n"


PARTS: dict[str, Callable[[], str]] = {"command_line": command_line, "errors": errors}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put generated parts in place of their markers."""
    return _MARKER.sub(lambda found: PARTS[found[1]](), markdown)
