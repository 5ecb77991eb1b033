"""Text in, batches of tokens out.

In: a local file or folder, or the name of a dataset on the hub, read by the ``datasets`` library; then a tokenizer. Out:
dictionaries of ``input_ids`` and ``attention_mask`` of a fixed length, which both ``rana_fx.adapt`` and
``rana_fx.evaluation.perplexity`` take. Documents are concatenated, so that only the last sequence can have padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rana_fx.choices import builder_of
from rana_fx.errors import ColumnMissing, DatasetError, InvalidOption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_texts(source: str | Path, *, column: str = "text", split: str | None = None, limit: int | None = None) -> list[str]:
    """Documents of a dataset, blank ones left out.

    Args:
        source: a .txt (one document), .json, .jsonl or .parquet file, each also as .xz or .gz; a folder of such files of one
            kind, or one that ``Dataset.save_to_disk`` wrote; or the name of a dataset on the hub, as "owner/name" or
            "owner/name:configuration".
        column: the column that holds the text.
        split: in the notation of ``datasets``, also with a slice ("train[:1%]"); default: "train" if present, else the first.
        limit: maximum number of documents, at least 1. A hub dataset is then streamed, not downloaded as a whole.

    Returns:
        The texts, in the order of the dataset.

    Raises:
        ColumnMissing: no such column; the message lists the columns.
        DatasetError: not readable, or without any text.
        InvalidOption: ``limit`` is less than 1.
    """
    if limit is not None and limit < 1:
        raise InvalidOption(name="limit", got=limit, expected="a positive number of documents")
    name = str(source)
    try:
        with _no_progress_bars():
            rows = _open(name, split=split, stream=limit is not None)
            columns = rows.column_names
    except DatasetError:
        raise
    except Exception as error:  # any exception of the library's readers, fsspec and pyarrow
        raise DatasetError(source=name, reason=_first_line(error)) from error
    if columns is not None and column not in columns:
        raise ColumnMissing(source=name, column=column, columns=", ".join(map(repr, columns)) or "no columns")
    texts: list[str] = []
    try:
        for row in rows if columns is None else rows.select_columns([column]):
            if column not in row:
                raise ColumnMissing(source=name, column=column, columns=", ".join(map(repr, row)))
            value = row[column]
            if value is not None and not isinstance(value, str):
                raise DatasetError(source=name, reason=f"column {column!r} holds {type(value).__name__}, not text")
            if value and value.strip():
                texts.append(value)
            if limit is not None and len(texts) >= limit:
                break
    except (ColumnMissing, DatasetError):
        raise
    except Exception as error:  # a streamed dataset is read only here
        raise DatasetError(source=name, reason=_first_line(error)) from error
    if not texts:
        raise DatasetError(source=name, reason=f"column {column!r} has no text")
    return texts


def token_batches(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int | None = None,
    context: int = 512,
    batch_size: int = 8,
) -> list[dict[str, Tensor]]:
    """Pack documents into sequences of ``context`` tokens.

    Each document is encoded with the special tokens of the tokenizer (a leading BOS where it adds one) and ends with EOS (SEP
    where there is no EOS). Documents are read only until ``tokens`` tokens are reached.

    Args:
        tokens: maximum number of tokens; default: all. context: tokens per sequence. batch_size: sequences per batch.

    Returns:
        Dictionaries of ``input_ids`` and ``attention_mask``, int64, (B, context), B <= batch_size. Only the last sequence can be
        padded, on the right, with mask 0. An empty list where the texts are empty.

    Raises:
        InvalidOption: a number that is not positive.
    """
    for option, value in (("tokens", tokens), ("context", context), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InvalidOption(name=option, got=value, expected="a positive number")
    ids = list(islice(_stream(texts, tokenizer), tokens))
    if not ids:
        return []
    sequences = -(-len(ids) // context)
    padding = sequences * context - len(ids)
    pad = next((i for i in (tokenizer.pad_token_id, _end_of_text(tokenizer)) if i is not None), 0)
    input_ids = torch.tensor(ids + [pad] * padding, device="cpu").view(sequences, context)
    mask = torch.ones_like(input_ids)
    if padding:
        mask[-1, -padding:] = 0
    return [
        {"input_ids": ids_BT, "attention_mask": mask_BT}
        for ids_BT, mask_BT in zip(input_ids.split(batch_size), mask.split(batch_size), strict=True)
    ]


def _stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for text in texts:
        yield from documents_of([text], tokenizer)[0]


def documents_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each document, special tokens and EOS (SEP) included; encoded in one call, on all cores if there are many."""
    end = _end_of_text(tokenizer)
    # verbose=False: no warning for documents longer than the model's context, which are expected here
    documents: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    for document in documents:
        if end is not None and (not document or document[-1] != end):
            document.append(end)
    return documents


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), None)


def _open(source: str, *, split: str | None, stream: bool) -> Any:
    """A Dataset or, for a hub name with ``stream``, an IterableDataset."""
    import datasets

    path = Path(source)
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _pick(source, datasets.load_from_disk(source), split)
    if path.exists():
        builder, files = _local(path, split)
        # a .txt file is one document, not one per line
        settings = {"sample_by": "document"} if builder == "text" else {}
        named = {"data_dir": source} if files is None else {"data_files": files}
        return _pick(source, datasets.load_dataset(builder, split=split, **named, **settings), split)
    if path.is_absolute() or source.startswith(".") or builder_of(path) is not None:
        raise DatasetError(source=source, reason="there is no such file or folder")
    name, _, configuration = source.partition(":")
    return _pick(
        source,
        datasets.load_dataset(name, configuration or None, split=split, streaming=stream and "[" not in (split or "")),
        split,
    )


def _local(path: Path, split: str | None) -> tuple[str, list[str] | None]:
    """Builder of ``datasets`` and the files it reads (None: it finds those of the split in the folder)."""
    if path.is_file():
        builder = builder_of(path)
        if builder is None:
            raise DatasetError(source=str(path), reason=f"files that end in {path.suffix or path.name!r} are not known")
        return builder, [str(path)]
    files = sorted(file for file in path.rglob("*") if file.is_file() and builder_of(file) is not None)
    kinds = {builder_of(file) for file in files}
    if not files:
        raise DatasetError(source=str(path), reason="the folder has no such file")
    if len(kinds) > 1:
        raise DatasetError(source=str(path), reason=f"the folder mixes kinds of files ({files[0].name}, {files[-1].name}, ...)")
    by_name = split is not None and split.partition("[")[0] != "train"
    return str(builder_of(files[0])), None if by_name else [str(file) for file in files]


def _pick(source: str, found: Any, split: str | None) -> Any:
    """A dataset, or one split of a dictionary of splits."""
    if not isinstance(found, dict):
        return found
    if not found:
        raise DatasetError(source=source, reason="it has no splits")
    if split is not None and split not in found:
        raise DatasetError(source=source, reason=f"it has no split {split!r}, only {', '.join(map(repr, found))}")
    return found[split or ("train" if "train" in found else next(iter(found)))]


def _first_line(error: BaseException) -> str:
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        return _first_line(error.__cause__)  # the cause names the fault
    text = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Progress bars of ``datasets`` are disabled inside: reading takes seconds."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
