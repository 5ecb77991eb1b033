"""A plan on disk: ``plan.json`` with the facts, and one safetensors file with the factors, named by its content.

The tensors are written first, under a name that no older plan uses; then ``plan.json`` is replaced in one step; only
then are tensors of an older plan removed. So at every moment the folder holds a whole plan: the old or the new one.
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

from rana_fx.adapter import TENSORS, Adapter, Kind
from rana_fx.atomic import replacing
from rana_fx.errors import BadOperand, PlanFileError, PlanVersion, PlanWriteError
from rana_fx.graph.linears import Skip
from rana_fx.plan import Plan, SiteRecord

FORMAT = 3  # 3: exact outputs of rank adapters
BEFORE = 2  # factors in 8 and 4 bits, weights of neuron adapters, masked routers, shifts; written where no output is exact
HEADER = "plan.json"


@dataclass(frozen=True)
class _AdapterFacts:
    name: str
    kind: Kind
    sites: tuple[str, ...]
    ranks: int
    kept: float
    flops: float
    dense_flops: float
    bytes: float
    dense_bytes: float
    error: float | None
    gate: str | None
    also: tuple[str, ...]
    router_kept: float | None
    exact_kept: float | None = None


@dataclass(frozen=True)
class _Facts:
    recipe: str
    metric: str
    budget: float
    seed: int
    tokens: int
    model: str
    versions: dict[str, str]
    sites: tuple[SiteRecord, ...]
    adapters: tuple[_AdapterFacts, ...]
    skips: tuple[Skip, ...]


_SCHEMA = pydantic.TypeAdapter(_Facts)


def write(plan: Plan, folder: Path) -> None:
    """Write atomically. Raises PlanWriteError."""
    tensors = {f"{i}.{key}": value.cpu().contiguous() for i, a in enumerate(plan.adapters) for key, value in a.tensors().items()}
    number = FORMAT if any(adapter.exact_tau is not None for adapter in plan.adapters) else BEFORE
    content = safetensors.torch.save(tensors, metadata={"rana_fx": str(number)})
    name = f"plan-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    header = {"format": number, "digest": plan.digest(), "tensors": name, "plan": plan.to_dict()}
    created = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not (folder / name).exists():
                created.append(folder / name)
                _replace(folder / name, content)
            _replace(folder / HEADER, json.dumps(header, indent=1).encode())
            # of an older plan, and of a save that was killed
            for old in [*folder.glob("plan-*.safetensors"), *folder.glob(".plan*.tmp")]:
                if old.name != name:
                    old.unlink(missing_ok=True)
    except OSError as error:
        for path in created:
            path.unlink(missing_ok=True)
        raise PlanWriteError(path=folder, reason=error.strerror or str(error)) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: another one's clean-up would take the tensors whose header is not written yet."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: as it was
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def read(folder: Path) -> Plan:
    """Read and check. Raises PlanFileError, PlanVersion."""
    content = _header(folder)
    while True:
        try:
            return _parse(folder, content)
        except PlanFileError:
            # saved anew meanwhile: the tensors of the header that was read may be gone
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


def _parse(folder: Path, content: bytes) -> Plan:
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
        facts = _SCHEMA.validate_python(header["plan"])
        tensors = _tensors(folder, str(header["tensors"]))
        adapters = tuple(_adapter(i, fact, tensors) for i, fact in enumerate(facts.adapters))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanFileError(path=folder / HEADER, reason=f"{where or 'plan'}: {first['msg']}") from error
    except (KeyError, AssertionError, BadOperand) as error:
        raise PlanFileError(path=folder, reason=f"facts and tensors do not belong together ({error})") from error
    rest = {key: getattr(facts, key) for key in facts.__dataclass_fields__ if key != "adapters"}
    plan = Plan(**rest, adapters=adapters)
    for adapter in adapters:
        _check_sites(folder, plan, adapter)
    if plan.digest() != header.get("digest"):
        raise PlanFileError(path=folder, reason="its content does not match its digest: it was changed after it was saved")
    return plan


def _tensors(folder: Path, name: str) -> dict[str, Any]:
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


def _adapter(index: int, facts: _AdapterFacts, tensors: dict[str, Any]) -> Adapter:
    own: dict[str, Any] = {key: tensors.get(f"{index}.{key}") for key in TENSORS if key != "tau"}
    fields: dict[str, Any] = {key: getattr(facts, key) for key in facts.__dataclass_fields__}
    return Adapter(**fields, tau=tensors[f"{index}.tau"], **own)


def _check_sites(folder: Path, plan: Plan, adapter: Adapter) -> None:
    """An adapter has the sizes of the linears it replaces. Raises PlanFileError."""
    records = {record.name: record for record in plan.sites}
    unknown = [site for site in (*adapter.sites, *adapter.also) if site not in records]
    if unknown:
        raise PlanFileError(path=folder, reason=f"adapter {adapter.name} replaces {unknown[0]}, which is not among its linears")
    sites = [records[site] for site in adapter.sites]
    out, widths = sum(site.out_features for site in sites), {site.in_features for site in sites}
    if widths != {adapter.width}:
        reason = f"adapter {adapter.name} reads {adapter.width} inputs, its linears {' and '.join(map(str, sorted(widths)))}"
        raise PlanFileError(path=folder, reason=reason)
    if adapter.out not in (None, out):
        raise PlanFileError(path=folder, reason=f"adapter {adapter.name} makes {adapter.out} outputs, its linears {out}")
