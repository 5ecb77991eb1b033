"""A plan on disk: ``plan.json`` with the facts, and one safetensors file with the factors, named by its content.

In: facts and tensors by name, as ``rana_fx.plan`` takes them from a plan. Out: a folder; and facts and tensors from a folder.

The tensors are written first, under a name that no older plan uses; then ``plan.json`` is replaced in one step; only
then are tensors of an older plan removed. So the folder holds a complete plan at any time: the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import safetensors
import safetensors.torch
from torch import Tensor

from rana_fx.atomic import locked, read_regular, remove_leftovers, write_bytes
from rana_fx.errors import PlanFileError, PlanVersion, PlanWriteError

FORMAT = 5  # a curve
SCOPE = 4  # a budget of another scope than the blocks
EXACT = 3  # exact outputs of rank adapters
BEFORE = 2  # factors in 8 and 4 bits, weights of neuron adapters, masked routers, shifts; written where nothing else is needed
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
    name = _name_of(content)
    header = {"format": stored.number, "digest": stored.digest, "tensors": name, "plan": stored.facts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            try:
                if not _holds(folder / name, content):
                    _replace(folder / name, content)
                _replace(folder / HEADER, json.dumps(header, indent=1).encode())
            except BaseException:
                _remove_unnamed(folder, [folder / name])
                raise
            _remove_unnamed(folder, folder.glob("plan-*.safetensors"))
            remove_leftovers(folder)
    except OSError as error:
        raise PlanWriteError(path=folder, reason=error.strerror or str(error)) from error
    except ValueError as error:  # a null byte in the name
        raise PlanWriteError(path=folder, reason=str(error)) from error


def _name_of(content: bytes) -> str:
    return f"plan-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file exists with this content; False where it was damaged."""
    try:
        return path.stat().st_size == len(content) and read_regular(path) == content
    except OSError:
        return False


def _remove_unnamed(folder: Path, tensors: Iterable[Path]) -> None:
    """Remove, where possible, the files that the header does not name: those of an older plan or of a failed save."""
    try:
        named = json.loads(read_regular(folder / HEADER))["tensors"]
    except FileNotFoundError:
        named = None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # without a readable header, all files may be needed
    for path in tensors:
        if path.name != named:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    write_bytes(path, content)


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
        return read_regular(folder / HEADER)
    except FileNotFoundError:
        raise PlanFileError(path=folder, reason=f"there is no {HEADER} in it") from None
    except NotADirectoryError:
        raise PlanFileError(path=folder, reason="it is a file, not a folder") from None
    except OSError as error:
        raise PlanFileError(path=folder / HEADER, reason=error.strerror or str(error)) from error
    except ValueError as error:  # a null byte in the name
        raise PlanFileError(path=folder, reason=str(error)) from error


def _parse(folder: Path, content: bytes, schema: pydantic.TypeAdapter[Any]) -> Stored:
    try:
        header: Any = json.loads(content)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is no JSONDecodeError
        raise PlanFileError(path=folder / HEADER, reason=f"it is not JSON ({error})") from error
    if not isinstance(header, dict) or "format" not in header:
        raise PlanFileError(path=folder / HEADER, reason="it has no format number")
    if header["format"] not in (BEFORE, EXACT, SCOPE, FORMAT):
        newer = isinstance(header["format"], int) and header["format"] > FORMAT
        todo = "Upgrade rana_fx." if newer else "Make the plan again with rana_fx.adapt."
        raise PlanVersion(path=folder, got=header["format"], expected=FORMAT, todo=todo)
    try:
        facts = schema.validate_python(header["plan"])
        return Stored(header["format"], header.get("digest"), facts, _tensors(folder, str(header["tensors"])))
    except PlanFileError:
        raise
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanFileError(path=folder / HEADER, reason=f"{where or 'plan'}: {first['msg']}") from error
    except KeyError as error:
        raise PlanFileError(path=folder, reason=f"facts and tensors do not belong together ({error})") from error
    except (ArithmeticError, RecursionError, ValueError) as error:  # numbers out of the range of floats; invalid file names
        raise PlanFileError(path=folder / HEADER, reason=str(error)) from error


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / Path(name).name
    try:
        content = read_regular(path)
    except OSError as error:
        raise PlanFileError(path=path, reason=error.strerror or str(error)) from error
    if f"plan-{hashlib.sha256(content).hexdigest()[:16]}.safetensors" != path.name:
        raise PlanFileError(path=path, reason="its bytes do not match its name: it is truncated or was changed")
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:  # a dtype that torch or this release does not support
        raise PlanFileError(path=path, reason=f"it is not a safetensors file ({error})") from error
