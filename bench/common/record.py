"""The common fields of all result rows, and writing rows to a JSONL file.

In: facts of one measurement. Out: a line of JSON with versions, commit, machine and command line added. Each row is written at
once, so an interrupted run keeps its rows. Paths are shortened to their last part, so that rows hold no machine paths.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rana_fx._version import versions
from rana_fx.atomic import write_bytes

ROOT = Path(__file__).resolve().parents[2]


def head(bench: str) -> dict[str, Any]:
    """Facts shared by all rows of one run."""
    # a copy of the tree without its git history gets the commit from the environment
    commit = os.environ.get("RANA_FX_COMMIT")
    return {
        "bench": bench,
        "command_line": command_line(bench),
        "commit": commit or _git("rev-parse", "HEAD"),
        "dirty": False if commit else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def command_line(bench: str) -> str:
    """As typed, with absolute paths shortened to file names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", f"bench.{bench}", *words])


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row; numbers that are not finite, which JSON lacks, become strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(row), allow_nan=False) + "\n")


def start(path: Path) -> None:
    """Create the file, or empty it: a file holds the rows of one run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() or path.is_dir() or not path.exists():  # a FIFO or a device has nothing to empty
        write_bytes(path, b"")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
