"""Training state on disk: a resumed run gives the same result as one that was not interrupted.

In: trained Parameters, optimizer, position, history. Out: one file, replaced in one step, so that the last complete one survives
a killed run. It contains no pickled code: it is read with ``weights_only``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rana_fx.atomic import replacing
from rana_fx.errors import CheckpointError

NAME = "checkpoint.pt"


def write(folder: Path, state: dict[str, Any]) -> None:
    """Write the state to a folder, atomically. Raises CheckpointError."""
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
    """The learning rate of the training run that wrote a checkpoint. Raises CheckpointError."""
    return float(read(folder, {})["fingerprint"]["setting rate"])


def read(folder: Path, fingerprint: dict[str, str]) -> dict[str, Any]:
    """The state in a folder. Raises CheckpointError where it cannot be read or has another fingerprint."""
    path = folder / NAME
    if not path.exists():
        raise CheckpointError(path=path, reason="there is no such file", todo="start without resuming")
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        found = dict(state["fingerprint"])
    except Exception as error:  # whatever zipfile and the unpickler raise
        raise CheckpointError(
            path=path, reason=f"it is not a complete checkpoint ({type(error).__name__})", todo="start without resuming"
        ) from error
    for key, value in fingerprint.items():
        if found.get(key) != value:
            reason = f"its {key} is {found.get(key)}, here it is {value}"
            raise CheckpointError(path=path, reason=reason, todo="pass what it was made with, or start without resuming")
    return state
