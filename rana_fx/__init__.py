"""rana_fx: adaptive rank allocation as a torch.compile backend.

``adapt`` calibrates a model on a little text and attaches a ``Plan`` to it; ``backend`` rewrites and compiles the model
by that plan; ``explain`` lists the action and the reason for every linear layer. Everything else is reached through these.

Names are imported on first use, and torch with them: ``import rana_fx`` and ``rana-fx --help`` take no second.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import pathlib
from typing import TYPE_CHECKING, Any

from rana_fx import _interrupts

_interrupts.while_importing()
_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    # in a checkout rana_fx.passes and rana_fx.kernels lie beside this folder: find them also where ./rana_fx hides the
    # installed package, as it does when Python runs from the repository root
    __path__.append(str(_root))

from rana_fx._moved import install as _install_moved_names
from rana_fx._version import __version__ as __version__
from rana_fx.errors import RanaError, RanaWarning

if TYPE_CHECKING:
    from rana_fx._backend import backend
    from rana_fx.adaptation import adapt
    from rana_fx.plan import Plan, load_plan
    from rana_fx.refinement import Refine
    from rana_fx.report import explain
    from rana_fx.runtime.attachment import attach, detach
    from rana_fx.runtime.disabling import disabled

__all__ = [
    "Plan",
    "RanaError",
    "RanaWarning",
    "Refine",
    "adapt",
    "attach",
    "backend",
    "detach",
    "disabled",
    "explain",
    "load_plan",
]

# name -> the module that it is imported from
_LAZY = {
    "Plan": "plan",
    "Refine": "refinement",
    "adapt": "adaptation",
    "attach": "runtime.attachment",
    "backend": "_backend",
    "detach": "runtime.attachment",
    "disabled": "runtime.disabling",
    "explain": "report",
    "load_plan": "plan",
}

_install_moved_names()
logging.getLogger(__name__).addHandler(logging.NullHandler())  # what is logged is shown where a program asks for it


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    # rana_fx.recipes, rana_fx.training: modules are there without an import of their own
    if not name.startswith("_") and importlib.machinery.PathFinder.find_spec(f"{__name__}.{name}", __path__) is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
