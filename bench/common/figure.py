"""Write a figure to a file atomically.

In: a figure of matplotlib and a path. Out: the file, in the format that its suffix names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rana_fx.atomic import replacing


def save_figure(figure: Any, path: Path, *, dpi: int = 130) -> None:
    """Write a figure; ``dpi``: dots per inch. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
