"""``rana-fx``, the command line: adapt, fine-tune, evaluate, explain and run a model.

In: arguments. Out: a table, and with ``--json FILE`` the same facts as JSON. A ``RanaError`` is printed as one message on stderr,
with exit code 2; RANA_FX_DEBUG=1 shows the traceback instead. Ctrl-C ends with one line and exit code 130.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rana_fx import _interrupts
from rana_fx._version import __version__
from rana_fx.commands import adapt, compare, demo, env, evaluate, explain, finetune, generate, sweep, tasks
from rana_fx.errors import RanaError


class _Group(TyperGroup):
    """Prints a ``RanaError`` as one message."""

    def invoke(self, ctx: Any) -> Any:
        _interrupts.while_running()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # names of files need not be text
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _interrupted() from None
        except Exception as error:
            if _interrupts.happened() and not isinstance(error, typer.Exit):
                raise _interrupted() from None
            found = _rana_error(error)
            if found is None or os.environ.get("RANA_FX_DEBUG") == "1":
                raise
            typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
            typer.echo(str(found), err=True)
            raise typer.Exit(2) from None


def _interrupted() -> typer.Exit:
    typer.echo("interrupted.", err=True)
    return typer.Exit(_interrupts.CODE)


def _rana_error(error: BaseException) -> RanaError | None:
    """The ``RanaError`` that an error is or wraps; torch.compile wraps errors of a backend."""
    inner: Any = error
    while inner is not None and not isinstance(inner, RanaError):
        inner = getattr(inner, "inner_exception", None)
    return inner


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"rana-fx {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="rana-fx",
    cls=_Group,
    help="Adaptive rank allocation for any Transformer that torch.compile can trace.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Adaptive rank allocation for any Transformer that torch.compile can trace."""


app.command("demo")(demo.command)
app.command("adapt")(adapt.command)
app.command("sweep")(sweep.command)
app.command("compare")(compare.command)
app.command("eval")(evaluate.command)
app.command("finetune")(finetune.command)
app.command("explain")(explain.command)
app.command("generate")(generate.command)
app.command("tasks")(tasks.command)
app.command("env")(env.command)

if __name__ == "__main__":
    app()
