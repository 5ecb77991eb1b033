"""Ctrl-C on the command line: one line and exit code 130, also while modules are imported.

In: nothing; what ran the process tells whether it is the command. Out: a handler of SIGINT. Modules in C turn a KeyboardInterrupt
inside their imports into errors of other types, so that no ``except KeyboardInterrupt`` sees it: until the command runs, the
handler ends the process itself, and after that it remembers that there was one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import PurePath
from types import FrameType

CODE = 130
_seen: list[int] = []


def while_importing() -> None:
    """Leave at once, where this process is the command and nobody else handles SIGINT; there is nothing to clean up yet."""
    program = PurePath(sys.argv[0]).stem if getattr(sys, "argv", None) else ""
    if program == "rana-fx" or sys.orig_argv[1:3] == ["-m", "rana_fx.cli"]:
        _handle(signal.default_int_handler, _leave)


def while_running() -> None:
    """Raise KeyboardInterrupt from now on."""
    _handle(_leave, _raise)


def happened() -> bool:
    """Whether a KeyboardInterrupt was raised, whatever became of it."""
    return bool(_seen)


def _handle(before: object, now: object) -> None:
    if signal.getsignal(signal.SIGINT) is before:
        try:
            signal.signal(signal.SIGINT, now)  # type: ignore[arg-type]
        except ValueError:  # not in the main thread
            return


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted.\n")
    os._exit(CODE)


def _raise(number: int, frame: FrameType | None) -> None:
    _seen.append(number)
    raise KeyboardInterrupt
