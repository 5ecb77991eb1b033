"""Files that are hashed into Inductor's cache key: all files that passes and kernels import, subfolders included."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from pathlib import Path

import pytest
from torch import fx
from torch._inductor.custom_graph_pass import get_hash_for_files

from rana_fx._backend import _PostGrad
from rana_fx.passes import sources
from rana_fx.passes.runner import run

PACKAGE, PASSES, KERNELS = sources.FOLDERS


def file_of(module):
    """The source file of a module of the package; None for a folder without one, or for a name that is no module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin).resolve() if spec is not None and spec.origin else None


def imported(path):
    """Modules of the package that a file imports anywhere in it, by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("rana_fx"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rana_fx"):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_everything_that_passes_and_kernels_reach_is_hashed():
    todo = [*PASSES.rglob("*.py"), *KERNELS.rglob("*.py"), PACKAGE / "_backend.py"]
    reached = set()
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            # not the package itself, which imports everything: only its modules
            todo += [found for name in imported(path) if name != "rana_fx" and (found := file_of(name)) is not None]
    hashed = {Path(name) for name in sources.hashed_files()}
    assert len(reached) > 40 and reached <= hashed, sorted(map(str, reached - hashed))
    assert {path.parent.name for path in hashed} >= {"rana_fx", "graph", "passes", "kernels", "triton", "cpp", "runtime"}
    # files that do not affect generated code: editing one causes no recompilation
    assert not any(part in path.parts for path in hashed for part in ("commands", "training", "recipes", "calibration"))


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The package's folders, copied to where a test may write."""
    folders = []
    for folder in sources.FOLDERS:
        folders.append(tmp_path / folder.name)
        shutil.copytree(folder, folders[-1], ignore=shutil.ignore_patterns("__pycache__", "data"))
    monkeypatch.setattr(sources, "FOLDERS", tuple(folders))
    forget()
    yield folders
    forget()


def forget():
    """Clear the cached hash here and in Inductor, as in a new process."""
    sources.sources_hash.cache_clear()
    get_hash_for_files.cache_clear()


@pytest.mark.parametrize(
    "name",
    ["kernels/triton/splitk.py", "kernels/cpp/router.py", "passes/fuse_gated.py", "rana_fx/graph/linears.py"]
    + ["rana_fx/runtime/prefill.py", "rana_fx/adapter.py", "rana_fx/_backend.py", "kernels/triton/made_today.py"],
)
def test_a_change_anywhere_is_another_key(copied, name):
    graph = fx.symbolic_trace(lambda x: x + 1)
    key = _PostGrad(run(graph)).uuid()
    assert _PostGrad(run(graph)).uuid() == key
    with (copied[0].parent / name).open("a") as file:
        file.write("\nCHANGED = True\n")
    forget()
    assert _PostGrad(run(graph)).uuid() != key


def test_a_change_beside_the_compiler_is_the_same_key(copied):
    before = sources.sources_hash()
    with (copied[0] / "training/loop.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    forget()
    assert sources.sources_hash() == before
