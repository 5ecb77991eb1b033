"""A plugin of pytest (``-p tests.support.without_extras``): packages of the optional extras cannot be imported, as if they were
not installed. ``test`` and ``lint`` are extras that tests need."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
EXTRAS = {
    re.match(r"[\w-]+", requirement)[0].replace("-", "_")
    for extra, requirements in _PROJECT["optional-dependencies"].items()
    if extra not in ("test", "lint")
    for requirement in requirements
}
sys.modules.update(dict.fromkeys(EXTRAS))
