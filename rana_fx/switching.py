"""Atomic replacement of several files of a folder.

In: a folder, and a ``with`` block that writes new files. Out: the folder with the new files in it. If the process is killed at
any point, a reader finds all old files or all new ones, under their own names, through symbolic links:

    stage     the new files are written to .rana_fx-switch/new, with the names that they have in the folder
    link      "now" links to "old", which has hard links to the old files; each file is replaced by a link to its name in "now"
    switch    "now" is replaced by a link to "new": the atomic step
    settle    each link is replaced by its target, and .rana_fx-switch is removed

A switch first completes an earlier one that was killed. On a file system without symbolic links, files are replaced one by one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rana_fx.atomic import keep_mode, locked, read_regular, write_bytes

PLACE = ".rana_fx-switch"
_ENTRIES, _NOW, _OLD, _NEW = "entries.json", "now", "old", "new"


@contextmanager
def switching(folder: Path, *, stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """A staging folder for new files, by their names in ``folder``; all of them replace the old ones when the block ends.

    Args:
        stale: whether an old file, by its name relative to ``folder``, is removed if there is no new one of that name. Called for
            files in the same folders as new ones.

    Raises:
        OSError, and what the block raises: the folder is unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        settle(folder)
        new = folder / PLACE / _NEW
        new.mkdir(parents=True)
        try:
            yield new
            names = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
            beside = {path.relative_to(folder).as_posix() for name in names for path in (folder / name).parent.glob("*")}
            gone = [name for name in sorted(beside - set(names)) if stale(name) and not (folder / name).is_dir()]
            entries = {name: _entry(folder, name) for name in [*names, *gone]}
            for name in names:
                _finish(new / name, entries[name])
            _switch(folder, entries)
        except BaseException:
            with suppress(OSError):
                settle(folder)
            raise
        with suppress(OSError):  # the new files are in place already, through links
            settle(folder)


def settle(folder: Path) -> None:
    """Replace the links of a killed switch by files: the old ones, or the new ones after the atomic step. Raises OSError."""
    place = folder / PLACE
    if not place.is_dir():
        return
    try:
        entries: dict[str, str] = json.loads(read_regular(place / _ENTRIES))
        way = (place / _NOW).readlink()
    except FileNotFoundError:
        entries, way = {}, Path(_OLD)  # killed before any link was made
    except ValueError as error:
        raise OSError(errno.EINVAL, "It was changed", str(place / _ENTRIES)) from error
    for name, relative in entries.items():
        entry, source = Path(os.path.realpath(folder)) / relative, place / way / name
        _link_name(entry).unlink(missing_ok=True)
        if entry.is_symlink() and str(entry.readlink()) == _leads(folder, entry, name):
            _move(source, entry) if source.is_file() else entry.unlink()
    shutil.rmtree(place)


def _switch(folder: Path, entries: dict[str, Path]) -> None:
    """Raises OSError."""
    place = folder / PLACE
    for name, entry in entries.items():
        if entry.exists():
            old = place / _OLD / name
            old.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(entry, old)
    try:
        (place / _NOW).symlink_to(_OLD)
    except (OSError, NotImplementedError):
        _one_by_one(place, entries)
        return
    relative = {name: os.path.relpath(entry, os.path.realpath(folder)) for name, entry in entries.items()}
    write_bytes(place / _ENTRIES, json.dumps(relative).encode())
    for name, entry in entries.items():
        entry.parent.mkdir(parents=True, exist_ok=True)
        link = _link_name(entry)
        link.unlink(missing_ok=True)
        link.symlink_to(_leads(folder, entry, name))
        link.replace(entry)
    (place / f"{_NOW}.tmp").symlink_to(_NEW)
    (place / f"{_NOW}.tmp").replace(place / _NOW)


def _one_by_one(place: Path, entries: dict[str, Path]) -> None:
    for name, entry in entries.items():
        source = place / _NEW / name
        entry.parent.mkdir(parents=True, exist_ok=True)
        _move(source, entry) if source.is_file() else entry.unlink()


def _entry(folder: Path, name: str) -> Path:
    """The file to replace; for a symbolic link, its target. Raises OSError where that is a folder or a device."""
    entry = Path(os.path.realpath(folder / name))
    if os.path.lexists(entry) and not entry.is_file():
        code = errno.EISDIR if entry.is_dir() else errno.EINVAL
        raise OSError(code, "It is not a regular file", str(folder / name))
    return entry


def _finish(path: Path, entry: Path) -> None:
    """Flush a new file to the disk, with the mode and the owner of the old one."""
    with path.open("rb") as file:
        if entry.exists():
            keep_mode(file.fileno(), entry.stat())
        os.fsync(file.fileno())


def _leads(folder: Path, entry: Path, name: str) -> str:
    """Target of the link that replaces a file; relative, so that the folder may be moved."""
    return os.path.relpath(Path(os.path.realpath(folder)) / PLACE / _NOW / name, entry.parent)


def _link_name(entry: Path) -> Path:
    return entry.with_name(f"{PLACE}.{entry.name[:100]}.link")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _move(source: Path, entry: Path) -> None:
    try:
        source.replace(entry)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = _link_name(entry)
        shutil.copy2(source, beside)
        beside.replace(entry)


def names_of(patterns: Iterable[str]) -> Callable[[str], bool]:
    """A predicate for ``stale``: whether a name matches one of the patterns."""
    found = tuple(patterns)
    return lambda name: any(Path(name).match(pattern) for pattern in found)
