"""Output of a command: tables on stdout, and a JSON file with the same facts.

In: the facts of a command. Out: the facts with command line, seed and versions added, written atomically, so that a reader
never sees a partial file.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rana_fx.atomic import write_bytes
from rana_fx.errors import InvalidOption

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def facts_of(command: str, *, seed: int | None = None, **options: object) -> dict[str, Any]:
    """The facts that every record has: the command, its options, seed and versions."""
    import importlib.metadata

    from rana_fx._version import __version__, versions

    return {
        "command": command,
        "command_line": shlex.join(["rana-fx", *sys.argv[1:]]),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "seed": seed,
        "versions": versions() | {"rana_fx": __version__, "datasets": importlib.metadata.version("datasets")},
    }


def write_json(path: Path | None, facts: dict[str, Any]) -> None:
    """Write facts to a file atomically; nothing where ``path`` is None. Raises InvalidOption."""
    if path is None:
        return
    try:
        text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
    except ValueError:
        # an infinite perplexity has no JSON number
        text = json.dumps(_finite(facts), indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
    except OSError as error:
        raise InvalidOption(
            name="--json", got=str(path), expected=f"a file that can be written ({error.strerror or error})"
        ) from error


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, notes: Iterable[str] = ()) -> None:
    """Print a table: the first column holds names, the others values, right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # without lines around cells: they would cost a third of a screen
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        # Text: names such as "w[0]" must not be read as markup
        table.add_row(*(Text(cell(value)) for value in row))
    console = Console()
    if not console.is_terminal:
        # a pipe has no width: do not fold cells
        console = Console(width=200)
    console.print(title, markup=False, highlight=False)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def cell(value: object) -> str:
    """A value formatted for a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return str(value)


def data_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    *,
    column: str,
    split: str | None,
    tokens: int,
    context: int,
    batch_size: int,
    shuffle: int | None = None,
) -> list[dict[str, Tensor]]:
    """Batches of a command's --data. ``shuffle``: seed of a random order of the documents; None: the order of the dataset.

    Raises ColumnMissing, DatasetError, InvalidOption.
    """
    from rana_fx.evaluation.text import token_batches

    texts = data_texts(model, data, column=column, split=split, tokens=tokens, context=context, shuffle=shuffle)
    return token_batches(texts, tokenizer, tokens=tokens, context=context, batch_size=batch_size)


def data_texts(
    model: PreTrainedModel,
    data: str,
    *,
    column: str,
    split: str | None,
    tokens: int,
    context: int,
    shuffle: int | None = None,
) -> list[str]:
    """Documents of a command's --data, enough for so many tokens. ``shuffle``: as ``data_batches`` takes it.

    Raises ColumnMissing, DatasetError, InvalidOption.
    """
    from rana_fx.evaluation.text import load_texts

    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise InvalidOption(name="--context", got=context, expected=f"at most {limit}, the model's own context")
    # every document has at least one token, so ``tokens`` documents are enough
    texts = load_texts(data, column=column, split=split, limit=tokens)
    if shuffle is not None:
        random.Random(shuffle).shuffle(texts)
    return texts


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
