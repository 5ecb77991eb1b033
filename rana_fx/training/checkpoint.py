"""State of a training on disk, from which it goes on exactly as if it had not stopped.

In: trained Parameters, optimizer, position, history. Out: one file, replaced in one step, so that a killed run leaves the last
whole one. No pickled code: it is read with ``weights_only``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rana_fx.atomic import replacing
from rana_fx.errors import CheckpointError

NAME = "checkpoint.pt"


def write(folder: Path, state: dict[str, Any]) -> None:
    """Raises CheckpointError."""
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            path=path, reason=f"it could not be written ({error})", todo="free space or pick another folder"
        ) from error


def rate_of(folder: Path) -> float:
    """The learning rate that a checkpoint was made with. Raises CheckpointError."""
    return float(read(folder, {})["fingerprint"]["setting rate"])


def read(folder: Path, fingerprint: dict[str, str]) -> dict[str, Any]:
    """The state, where it is of a training with this fingerprint. Raises CheckpointError."""
    path = folder / NAME
    if not path.exists():
        raise CheckpointError(path=path, reason="there is no such file", todo="start without resuming")
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        found = dict(state["fingerprint"])
    except Exception as error:  # whatever zipfile and the unpickler raise
        raise CheckpointError(
            path=path, reason=f"it is not a whole checkpoint ({type(error).__name__})", todo="start anew"
        ) from error
    for key, value in fingerprint.items():
        if found.get(key) != value:
            reason = f"its {key} is {found.get(key)}, here it is {value}"
            raise CheckpointError(path=path, reason=reason, todo="pass what it was made with, or start anew")
    return state
