"""A plan on disk: ``plan.json`` with the facts, and one safetensors file with the factors, named by its content.

In: facts and tensors by name, as ``rana_fx.plan`` takes them from a plan. Out: a folder; and facts and tensors from a folder.

The tensors are written first, under a name that no older plan uses; then ``plan.json`` is replaced in one step; only
then are tensors of an older plan removed. So the folder holds a complete plan at any time: the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import safetensors
import safetensors.torch
from torch import Tensor

from rana_fx.atomic import replacing
from rana_fx.errors import PlanFileError, PlanVersion, PlanWriteError

FORMAT = 3  # 3: exact outputs of rank adapters
BEFORE = 2  # factors in 8 and 4 bits, weights of neuron adapters, masked routers, shifts; written where no output is exact
HEADER = "plan.json"


@dataclass(frozen=True)
class Stored:
    """The content of a folder. number: of the format. facts: JSON-able; after ``read``, validated by the schema."""

    number: int
    digest: object
    facts: Any
    tensors: dict[str, Tensor]


def write(stored: Stored, folder: Path) -> None:
    """Write atomically. Raises PlanWriteError."""
    tensors = {key: value.cpu().contiguous() for key, value in stored.tensors.items()}
    content = safetensors.torch.save(tensors, metadata={"rana_fx": str(stored.number)})
    name = f"plan-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    header = {"format": stored.number, "digest": stored.digest, "tensors": name, "plan": stored.facts}
    created = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not (folder / name).exists():
                created.append(folder / name)
                _replace(folder / name, content)
            _replace(folder / HEADER, json.dumps(header, indent=1).encode())
            # files of an older plan, and of a save that was killed
            for old in [*folder.glob("plan-*.safetensors"), *folder.glob(".plan*.tmp")]:
                if old.name != name:
                    old.unlink(missing_ok=True)
    except OSError as error:
        for path in created:
            path.unlink(missing_ok=True)
        raise PlanWriteError(path=folder, reason=error.strerror or str(error)) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: the clean-up of another process would remove tensors whose header is not written yet."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: proceed without one
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def read(folder: Path, schema: pydantic.TypeAdapter[Any]) -> Stored:
    """Read, and check that facts fit ``schema`` and tensors are complete. Raises PlanFileError, PlanVersion."""
    content = _header(folder)
    while True:
        try:
            return _parse(folder, content, schema)
        except PlanFileError:
            # a concurrent save may have removed the tensors of the header that was read
            before, content = content, _header(folder)
            if content == before:
                raise


def _header(folder: Path) -> bytes:
    try:
        return (folder / HEADER).read_bytes()
    except FileNotFoundError:
        raise PlanFileError(path=folder, reason=f"there is no {HEADER} in it") from None
    except NotADirectoryError:
        raise PlanFileError(path=folder, reason="it is a file, not a folder") from None
    except OSError as error:
        raise PlanFileError(path=folder / HEADER, reason=error.strerror or str(error)) from error


def _parse(folder: Path, content: bytes, schema: pydantic.TypeAdapter[Any]) -> Stored:
    try:
        header: Any = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanFileError(path=folder / HEADER, reason=f"it is not JSON ({error})") from error
    if not isinstance(header, dict) or "format" not in header:
        raise PlanFileError(path=folder / HEADER, reason="it has no format number")
    if header["format"] not in (BEFORE, FORMAT):
        newer = isinstance(header["format"], int) and header["format"] > FORMAT
        todo = "Upgrade rana_fx." if newer else "Make the plan again with rana_fx.adapt."
        raise PlanVersion(path=folder, got=header["format"], expected=FORMAT, todo=todo)
    try:
        facts = schema.validate_python(header["plan"])
        return Stored(header["format"], header.get("digest"), facts, _tensors(folder, str(header["tensors"])))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanFileError(path=folder / HEADER, reason=f"{where or 'plan'}: {first['msg']}") from error
    except KeyError as error:
        raise PlanFileError(path=folder, reason=f"facts and tensors do not belong together ({error})") from error


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / Path(name).name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanFileError(path=path, reason=error.strerror or str(error)) from error
    if f"plan-{hashlib.sha256(content).hexdigest()[:16]}.safetensors" != path.name:
        raise PlanFileError(path=path, reason="its bytes do not match its name: it is truncated or was changed")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise PlanFileError(path=path, reason=f"it is not a safetensors file ({error})") from error
