"""``--config FILE``: options of a command from a YAML or TOML file; what is given on the command line wins.

In: a file with the names of options, with "-" or "_", and their values; at the top for this command, or in a section with the
name of a command, so that one file serves several. Out: defaults of the command's parameters. A name that the command does not
have is an error that names what was probably meant.

    model: HuggingFaceTB/SmolLM2-135M
    adapt:
      data: calib.jsonl
      budget: 0.58
      out: plan
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from rana_fx.errors import InvalidOption, UnknownChoice

NUMBERS = "NUMBERS"  # metavar of an option that takes several, with commas; in a file a list
_EXCLUDED = ("help", "config")


def read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config, before all other options. Raises InvalidOption, UnknownChoice."""
    if path is not None:
        defaults = _defaults(ctx, path, _content(path))
        ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _content(path: Path) -> Mapping[str, Any]:
    """Raises InvalidOption."""
    try:
        content = path.read_bytes()
        if path.suffix == ".toml":
            return tomllib.loads(content.decode())
        if path.suffix not in (".yaml", ".yml"):
            raise InvalidOption(name="--config", got=str(path), expected="a .yaml, .yml or .toml file")
        import yaml

        found = yaml.safe_load(content)
    except OSError as error:
        raise InvalidOption(name="--config", got=str(path), expected=f"a file that can be read ({error.strerror})") from error
    except InvalidOption:
        raise
    except Exception as error:  # of two parsers, and of what is not UTF-8
        expected = f"valid {path.suffix.removeprefix('.').upper()} ({' '.join(str(error).split())})"
        raise InvalidOption(name="--config", got=str(path), expected=expected) from error
    if not isinstance(found, dict | None):
        raise InvalidOption(name="--config", got=str(path), expected="names of options with values, such as budget: 0.58")
    return found or {}


def _defaults(ctx: typer.Context, path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """By parameter. Raises InvalidOption, UnknownChoice."""
    group: Any = ctx.parent.command if ctx.parent is not None else None
    commands = set(getattr(group, "commands", {}))
    names = _names(ctx.command)
    given: dict[str, Any] = {key: value for key, value in content.items() if key not in commands}
    section = content.get(ctx.info_name or "", {})
    if not isinstance(section, dict):
        raise InvalidOption(name=str(path), got=section, expected=f"names of options below {ctx.info_name}")
    found = {}
    for key, value in [*given.items(), *section.items()]:
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            valid = ", ".join(sorted({one.replace("_", "-") for one in names} | commands))
            raise UnknownChoice(kind=f"{path}: option", got=key, valid=valid)
        found[name] = _value(path, key, value, ctx.command, name)
    return {name: value for name, value in found.items() if value is not None}


def _names(command: Any) -> dict[str, str]:
    """Every spelling of an option or argument, with "_" -> the parameter."""
    found = {}
    for parameter in command.params:
        if parameter.name in _EXCLUDED:
            continue
        for spelled in (parameter.name, *parameter.opts):
            found[spelled.lstrip("-").replace("-", "_")] = parameter.name
    return found


def _value(path: Path, key: object, value: Any, command: Any, name: str) -> Any:
    """As a string where the command line would have one, so that it is checked as there. Raises InvalidOption."""
    parameter = next(one for one in command.params if one.name == name)
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise InvalidOption(name=f"{path}: {key}", got=value, expected="true or false")
        return value
    many = getattr(parameter, "multiple", False)
    if isinstance(value, list) and getattr(parameter, "metavar", None) == NUMBERS:
        return ",".join(map(str, value))
    values = value if isinstance(value, list) and many else [value]
    if any(isinstance(one, bool | dict | list) for one in values):
        raise InvalidOption(name=f"{path}: {key}", got=value, expected="a value" + (", or a list of values" if many else ""))
    if value is None:
        return None
    return [str(one) for one in values] if many else str(value)
