"""Atomic replacement of a file: readers see the old content or the new one, never a part.

In: a path, and writes inside a ``with`` block. Out: the file, replaced in one step once its bytes are on the disk. A write that
fails or is killed leaves the old file unchanged; the temporary file of a killed write is removed by the next write of that path.

Only regular files are replaced; mode and owner are kept. A symbolic link stays, and its target is written. A FIFO, a device and a
descriptor of this process (/dev/stdout, /dev/fd/3) are written to. A folder is an error.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

READER_SECONDS = 5.0  # to wait for a process that reads a FIFO
_STALE_SECONDS = 86_400  # on a file system without locks, a temporary file of this age counts as abandoned
_TEMPORARY = re.compile(r"\.(.+)\.\d+(-[0-9a-f]{8})?\.tmp", re.DOTALL)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``path``, open for writing bytes, that replaces ``path`` when the block ends.

    Raises:
        OSError: the path is a folder, cannot be written, or is a FIFO that no process reads. Also what the block raises; the
            temporary file is removed then.
    """
    found = _status(path)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    descriptor = _own_descriptor(path)
    if descriptor is not None or (found is not None and not stat.S_ISREG(found.st_mode)):
        buffer = io.BytesIO()
        yield buffer
        _pour(path, descriptor, buffer.getvalue())
        return
    target = Path(os.path.realpath(path))
    if found is not None and not os.access(target, os.W_OK):  # a rename does not check the permission of the file
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    remove_leftovers(target.parent, _label(target.name))
    temporary, file = _reserve(target, 0o666 if found is None else 0o600)
    try:
        with file:
            yield file
            file.flush()
            if found is not None:
                keep_mode(file.fileno(), found)
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            temporary.replace(target)  # before its lock is released
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file with this content. Raises OSError."""
    with replacing(path) as file:
        file.write(content)


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises what ``open_regular`` raises."""
    with open_regular(path) as file:
        return file.read()


def open_regular(path: Path) -> BinaryIO:
    """A regular file, or a symbolic link to one, opened for reading.

    Raises:
        OSError: also for a folder, FIFO or device, before reading: a read of some of them never ends.
    """
    _check_regular(path.stat().st_mode, path)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclusive lock of a folder across processes and threads; no effect on a file system without locks. Raises OSError."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, label: str | None = None) -> None:
    """Remove temporary files of killed writes, of one file or of all files of a folder. Files being written are locked."""
    with suppress(OSError):
        for path in folder.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match is not None and label in (None, match[1]):
                _remove_abandoned(path)


def keep_mode(handle: int, found: os.stat_result) -> None:
    """Give an open file the mode and, where permitted, the owner of the file that it replaces."""
    now = os.fstat(handle)
    with suppress(OSError, AttributeError):
        if (now.st_uid, now.st_gid) != (found.st_uid, found.st_gid):
            try:
                os.fchown(handle, found.st_uid, found.st_gid)
            except OSError:
                os.fchown(handle, -1, found.st_gid)
    with suppress(OSError, AttributeError):
        os.fchmod(handle, stat.S_IMODE(found.st_mode))


def _status(path: Path) -> os.stat_result | None:
    """The status of the target of ``path``; None where it does not exist. Raises OSError, also for a cycle of links."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except ValueError as error:  # a null byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error


def _check_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "It is not a regular file", str(path))


def _label(name: str) -> str:
    """The name, or a digest of a long one: file names have at most 255 bytes, and a suffix is added."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 200 else hashlib.sha256(encoded).hexdigest()[:32]


def _reserve(target: Path, mode: int) -> tuple[Path, BinaryIO]:
    """A new file beside ``target``, locked while it is open. Raises OSError."""
    while True:
        temporary = target.with_name(f".{_label(target.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        file = os.fdopen(handle, "wb")
        if fcntl is None:
            return temporary, file
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        # before it was locked, another process may have removed it as abandoned
        with suppress(OSError):
            if os.path.samestat(temporary.stat(), os.fstat(handle)):
                return temporary, file
        file.close()


def _remove_abandoned(path: Path) -> None:
    """Unlink a temporary file that no process has locked."""
    if fcntl is None or not path.is_file() or path.is_symlink():
        return
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                if time.time() - os.fstat(handle).st_mtime < _STALE_SECONDS:
                    return
            path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _own_descriptor(path: Path) -> int | None:
    """The open descriptor of this process that ``path`` names, as /dev/stdout and /dev/fd/3 do."""
    for _ in range(40):
        if path.name.isdecimal() and os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd":
            return int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


def _pour(path: Path, descriptor: int | None, content: bytes) -> None:
    """Write to a descriptor, a FIFO or a device. Raises OSError."""
    if descriptor is not None:
        if sys.stdout is not None:
            sys.stdout.flush()  # keeps the order of output
        handle = os.dup(descriptor)
    else:
        handle = _open_special(path)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _open_special(path: Path) -> int:
    """A descriptor for writing; for a FIFO, waits up to ``READER_SECONDS`` for a reader. Raises OSError."""
    deadline = time.monotonic() + READER_SECONDS
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(path.stat().st_mode):
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.ENXIO, "No process reads this FIFO", str(path)) from None
            time.sleep(0.02)
        else:
            os.set_blocking(handle, True)
            return handle
