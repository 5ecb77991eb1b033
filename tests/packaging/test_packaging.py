"""The installed package works from a wheel, from a checkout and next to transformers.

The wheel is built from a copy of the checkout, so that the checkout stays clean, installed into a separate folder and imported by
a new interpreter in another directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import rana_fx

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rana_fx", "passes", "kernels")
PRINT_ORIGINS = (
    "import rana_fx, rana_fx.passes.runner, rana_fx.kernels.ops, rana_fx.commands\n"
    "for module in (rana_fx, rana_fx.passes, rana_fx.passes.runner, rana_fx.kernels.ops): print(module.__file__)"
)


def python(code, *, cwd, path=None):
    """The lines a fresh interpreter prints; ``path`` goes before site-packages, the current directory is not on it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    env |= {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def has_distribution(name):
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def pip(*arguments, cwd):
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without network access."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_every_file_and_nothing_else(wheel):
    expected = {
        (path if path.parts[0] == "rana_fx" else Path("rana_fx", path)).as_posix()
        for name in PACKAGES
        for path in (file.relative_to(ROOT) for file in (ROOT / name).rglob("*") if file.is_file())
        if "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        got = {name for name in archive.namelist() if not name.endswith("/")}
        entry_points = archive.read(next(name for name in got if name.endswith("entry_points.txt"))).decode()
    assert {name for name in got if ".dist-info/" not in name} == expected
    assert {"rana_fx/py.typed", "rana_fx/data/calib.jsonl.xz", "rana_fx/data/tiny-llama-prose-5m/model.safetensors"} <= expected
    assert "rana = rana_fx._backend:backend" in entry_points
    assert "rana-fx = rana_fx.cli:app" in entry_points


def test_a_clone_builds_a_wheel_of_every_committed_file(tmp_path):
    """As ``pip install git+URL`` does: from what is committed alone."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not in a clone")
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", tmp_path / "clone"], check=True)
    listing = ["git", "-C", tmp_path / "clone", "ls-files", *PACKAGES]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    pip("wheel", "--no-build-isolation", "--wheel-dir", tmp_path, tmp_path / "clone", cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        got = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert got == {name if name.startswith("rana_fx/") else f"rana_fx/{name}" for name in listed}


@pytest.mark.slow
def test_wheel_works_from_another_directory(installed, tmp_path):
    """Its backend is found by name, and each part is that of the wheel."""
    code = (
        "import torch\n"
        "print('rana' in torch.compiler.list_backends())\n"
        "import rana_fx\n"
        "print(torch._dynamo.lookup_backend('rana') is rana_fx.backend)\n"
    )
    listed, same, *origins = python(code + PRINT_ORIGINS, cwd=tmp_path, path=installed)
    assert listed == same == "True"
    assert len(origins) == 4
    assert all(Path(origin).is_relative_to(installed) for origin in origins), origins


@pytest.mark.slow
def test_checkout_on_the_path_finds_its_own_parts_and_no_slow_library(tmp_path):
    # each of these takes seconds to import, and only the command line needs them
    slow = "{'transformers', 'datasets', 'pandas', 'scipy', 'matplotlib', 'rich', 'typer'}"
    code = f"import sys, rana_fx\nprint(*{slow} & set(sys.modules))\n"
    imported, *origins = python(code + PRINT_ORIGINS, cwd=tmp_path, path=ROOT)
    assert imported == ""
    assert [Path(origin).relative_to(ROOT).parts[0] for origin in origins] == ["rana_fx", "passes", "passes", "kernels"]


@pytest.mark.slow
def test_checkout_hides_an_installed_wheel_whole(installed):
    # the case of `python -m pytest` in a checkout with a plain install: ./rana_fx comes first and must find its passes
    origins = python(PRINT_ORIGINS, cwd=ROOT, path=f"{ROOT}{os.pathsep}{installed}")
    assert all(Path(origin).is_relative_to(ROOT) for origin in origins), origins


@pytest.mark.slow
def test_transformers_does_not_take_our_kernels_for_the_package_of_that_name(tmp_path):
    code = (
        "import sys\n"
        "from transformers import LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "print(is_kernels_available())\n"
        "print(*(getattr(sys.modules[name], '__file__', None) for name in sys.modules if name.split('.')[0] == 'kernels'))"
    )
    available, files = python(code, cwd=tmp_path, path=ROOT)
    # an empty namespace of that name is harmless; importing a file through it would register its operators a second time
    assert str(ROOT) not in files
    if not has_distribution("kernels"):
        assert available == "False"


def test_kernels_stays_without_an_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_surface():
    assert set(rana_fx.__all__) == {
        "Plan", "RanaError", "RanaWarning", "adapt", "attach", "backend", "detach", "disabled", "explain", "load_plan",
    }  # fmt: skip
    assert len(rana_fx.__all__) <= 10
    assert rana_fx.__all__ == sorted(rana_fx.__all__)
    assert all(hasattr(rana_fx, name) for name in rana_fx.__all__)


def test_backend_is_registered_when_installed():
    if not has_distribution("rana-fx"):
        pytest.skip("rana-fx is imported from a checkout and not installed")
    assert metadata.version("rana-fx") == rana_fx.__version__
    assert "rana" in torch.compiler.list_backends()
    assert torch._dynamo.lookup_backend("rana") is rana_fx.backend


@pytest.mark.slow
def test_installed_distribution_works_from_another_directory(tmp_path):
    # `make test` installs the checkout editable: passes/ and kernels/ are then found by setuptools' finder
    if not has_distribution("rana-fx"):
        pytest.skip("rana-fx is imported from a checkout and not installed")
    code = "import torch\nprint('rana' in torch.compiler.list_backends())\n" + PRINT_ORIGINS
    listed, *origins = python(code, cwd=tmp_path)
    assert listed == "True"
    assert len(origins) == 4
