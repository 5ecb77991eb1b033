"""Training state on disk: a resumed run gives the same result as one that was not interrupted.

In: trained Parameters, optimizer, position, history. Out: one file, replaced in one step, so that the last complete one survives
a killed run. It has a checksum of its content, since archives of torch are read without a check. It contains no pickled code: it
is read with ``weights_only``. Files of earlier versions, without a checksum, are read, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rana_fx.atomic import open_regular, replacing
from rana_fx.errors import CheckpointError, CheckpointWriteError
from rana_fx.training.checksum import checksum

NAME = "checkpoint.pt"
_PARTS = {"fingerprint", "parameters", "optimizer", "rng", "done"}
_CHECKSUM = "checksum"


def write(folder: Path, state: dict[str, Any]) -> None:
    """Write the state to a folder, atomically. Raises CheckpointWriteError."""
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(state | {_CHECKSUM: checksum(state)}, file)
    except (OSError, RuntimeError) as error:
        kept = "The checkpoint that was there before is unchanged" if path.is_file() else "No checkpoint was left there"
        raise CheckpointWriteError(path=path, reason=getattr(error, "strerror", None) or str(error), kept=kept) from error


def rate_of(folder: Path) -> float:
    """The learning rate of the training run that wrote a checkpoint. Raises CheckpointError."""
    rate = read(folder, {})["fingerprint"].get("setting rate")
    try:
        return float(rate)
    except (TypeError, ValueError) as error:
        raise _damaged(folder / NAME, f"its learning rate is {rate!r}") from error


def read(folder: Path, fingerprint: dict[str, str]) -> dict[str, Any]:
    """The state in a folder. Raises CheckpointError where it is not complete or has another fingerprint."""
    path = folder / NAME
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise CheckpointError(path=path, reason="there is no such file", todo="start without resuming") from None
    except OSError as error:
        raise CheckpointError(path=path, reason=error.strerror or str(error), todo="start without resuming") from error
    try:
        with file:
            state: Any = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # zipfile and the unpickler may raise anything
        raise _damaged(path, type(error).__name__) from error
    if not isinstance(state, dict):
        raise _damaged(path, f"it is a {type(state).__name__}")
    written = state.pop(_CHECKSUM, None)
    if set(state) != _PARTS:
        odd = sorted(map(str, set(state) ^ _PARTS))
        raise _damaged(path, f"it lacks, or should not have: {', '.join(odd[:4])}")
    try:
        right = written is None or written == checksum(state)
    except (TypeError, RecursionError):  # values of types that no training state has
        right = False
    if not right:
        raise _damaged(path, "its content does not match its checksum: it was changed after it was saved")
    found = state["fingerprint"]
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _damaged(path, "its fingerprint is none")
    for key, value in fingerprint.items():
        if found.get(key) != value:
            reason = f"its {key} is {found.get(key)}, here it is {value}"
            raise CheckpointError(path=path, reason=reason, todo="pass what it was made with, or start without resuming")
    return state


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(path=path, reason=f"it is not a complete checkpoint ({what})", todo="start without resuming")
