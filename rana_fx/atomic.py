"""Atomic replacement of a file: readers see the old content or the new one, never a part.

In: a path, and writes inside a ``with`` block. Out: the file, replaced in one step once its bytes are on the disk. A write that
fails or is killed leaves the old file unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``path``, open for writing bytes, that replaces ``path`` when the block ends.

    Raises what the block or the file system raises, after the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
