"""The hash of every source file that can change generated code: part of Inductor's cache key, which covers only Inductor's code.

In: this package's files. Out: one hash. A new file is hashed unless its folder is listed as unable to change generated code, so
that a missing entry causes a needless compilation and never the reuse of code of another version.
"""

from __future__ import annotations

import functools
from pathlib import Path

from torch._inductor.custom_graph_pass import get_hash_for_files

from rana_fx import errors, formats
from rana_fx.kernels import reference
from rana_fx.kernels.autotune import sources_in

# folders of the package; in an editable install passes and kernels are outside of rana_fx
FOLDERS = tuple(Path(str(file)).resolve().parent for file in (errors.__file__, __file__, reference.__file__))
# parts that run before a plan exists or outside of the compiler; passes and kernels import none of them
NO_CODE = {"adaptation", "calibration", "cli", "commands", "data", "demo", "evaluation", "harness", "integrations", "lm_eval"}
NO_CODE |= {"__init__", "_moved", "recipes", "report", "training"}


def hashed_files() -> tuple[str, ...]:
    """All sources of the package but those of ``NO_CODE``, subfolders included, and those of registered storage formats."""
    package, *others = FOLDERS
    files = {path for path in package.rglob("*.py") if path.relative_to(package).parts[0].removesuffix(".py") not in NO_CODE}
    files |= {path for folder in others for path in sources_in(folder)}
    files |= {Path(path).resolve() for path in formats.sources()}
    return tuple(sorted(map(str, files)))


@functools.cache
def sources_hash() -> bytes:
    """The hash of the files at the first call."""
    return get_hash_for_files(hashed_files())
