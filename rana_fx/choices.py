"""Names that options take, and the kinds of files that hold text; importing this loads no torch.

In: nothing. Out: tuples of names for help texts, completion and checks before anything is loaded. Recipes of others are in
``rana_fx.recipes.RECIPES`` alone.
"""

from __future__ import annotations

from pathlib import Path

from rana_fx.cost import METRICS as METRICS
from rana_fx.cost import SCOPES as SCOPES

RECIPES = ("dense", "static", "cats", "teal", "wina", "exact", "paper", "rana")
WITHOUT_BUDGET = ("exact",)  # recipes of which there is one plan
WITHOUT_LOSS = ("dense", *WITHOUT_BUDGET)  # recipes that approximate nothing
DTYPES = ("auto", "float32", "bfloat16", "float16")
PREFILLS = ("masked", "dense", "cheapest", "factors")
CACHES = ("static", "dynamic")
METHODS = ("lora", "full", "factors")  # of fine-tuning

_TEXT_FILES = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_COMPRESSED = (".xz", ".gz")


def builder_of(path: Path) -> str | None:
    """The builder of ``datasets`` that reads a file of that name, compressed or not; None where there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _TEXT_FILES.get(suffixes[-1]) if suffixes else None
