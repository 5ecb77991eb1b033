"""rana_fx: adaptive rank allocation as a torch.compile backend.

``adapt`` calibrates a model on a little text and attaches a ``Plan`` to it; ``backend`` rewrites and compiles the model
by that plan; ``explain`` lists the action and the reason for every linear layer. Everything else is reached through these.
"""

from __future__ import annotations

import pathlib

from rana_fx import _interrupts

_interrupts.while_importing()
_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    # in a checkout rana_fx.passes and rana_fx.kernels lie beside this folder: find them also where ./rana_fx hides the
    # installed package, as it does when Python runs from the repository root
    __path__.append(str(_root))

from rana_fx._backend import backend
from rana_fx._moved import install as _install_moved_names
from rana_fx._version import __version__ as __version__
from rana_fx.adaptation import adapt
from rana_fx.errors import RanaError, RanaWarning
from rana_fx.plan import Plan, load_plan
from rana_fx.report import explain
from rana_fx.runtime.attachment import attach, detach
from rana_fx.runtime.disabling import disabled

__all__ = ["Plan", "RanaError", "RanaWarning", "adapt", "attach", "backend", "detach", "disabled", "explain", "load_plan"]

_install_moved_names()
