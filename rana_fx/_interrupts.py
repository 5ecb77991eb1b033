"""Ctrl-C on the command line: one line and exit code 130, also while modules are imported.

In: nothing; the arguments of the process identify the command. Out: a handler of SIGINT. Extension modules turn a
KeyboardInterrupt during import into errors of other types, which ``except KeyboardInterrupt`` does not catch. Until the command
runs, the handler therefore exits the process; afterwards it records the signal and raises KeyboardInterrupt.
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
    """Exit on SIGINT if this process is the command and SIGINT has Python's default handler; nothing needs cleaning up yet."""
    program = PurePath(sys.argv[0]).stem if getattr(sys, "argv", None) else ""
    if program == "rana-fx" or sys.orig_argv[1:3] == ["-m", "rana_fx.cli"]:
        _handle(signal.default_int_handler, _leave)


def while_running() -> None:
    """Raise KeyboardInterrupt on SIGINT from now on."""
    _handle(_leave, _raise)


def happened() -> bool:
    """Whether the handler raised a KeyboardInterrupt, whether or not it was caught."""
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
