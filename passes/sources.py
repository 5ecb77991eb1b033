"""The hash of every source file that can change generated code: part of Inductor's cache key, which hashes no code outside of it.

In: this package's files. Out: one hash. A new file is hashed unless it lies in a part that is listed as unable to change code, so
that a forgotten one costs a compilation and never serves code that another version made.
"""

from __future__ import annotations

import functools
from pathlib import Path

from torch._inductor.custom_graph_pass import get_hash_for_files

from rana_fx import errors, formats
from rana_fx.kernels import reference

# of the package; an editable install has passes and kernels elsewhere
FOLDERS = tuple(Path(str(file)).resolve().parent for file in (errors.__file__, __file__, reference.__file__))
# what runs before a plan exists or beside the compiler: nothing that passes and kernels import is among it
NO_CODE = {"adaptation", "calibration", "cli", "commands", "data", "demo", "evaluation", "harness", "integrations", "lm_eval"}
NO_CODE |= {"__init__", "_moved", "recipes", "report", "training"}


def hashed_files() -> tuple[str, ...]:
    """All Python files of the package but those of ``NO_CODE``, subfolders included, and those of registered storage formats."""
    package, *others = FOLDERS
    files = {path for path in package.rglob("*.py") if path.relative_to(package).parts[0].removesuffix(".py") not in NO_CODE}
    files |= {path for folder in others for path in folder.rglob("*.py")}
    files |= {Path(path).resolve() for path in formats.sources()}
    return tuple(sorted(map(str, files)))


@functools.cache
def sources_hash() -> bytes:
    """Of the files as they are when it is first called."""
    return get_hash_for_files(hashed_files())
