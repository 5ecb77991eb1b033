"""load_texts reads every kind of file it names and refuses others with a reason; token_batches loses and invents no token."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from functools import cache
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from rana_fx.errors import ColumnMissing, DatasetError, InvalidOption
from rana_fx.evaluation.text import load_texts, token_batches

TEXTS = ["one two three", "four\nfive", "six"]
WORDS = ["<end>", "one", "two", "three", "four", "five", "six"]
END = 0


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@cache
def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def rows(column: str = "text") -> str:
    return "".join(json.dumps({column: text, "n": 1}) + "\n" for text in TEXTS)


def packed(write: Callable[..., object], path: Path, text: str) -> Path:
    with write(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "jsonl.xz"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    write = {"gz": gzip.open, "xz": lzma.open}.get(suffix.rpartition(".")[2], open)
    assert load_texts(packed(write, tmp_path / f"a.{suffix}", rows())) == TEXTS


@pytest.mark.parametrize("suffix", ["txt", "txt.xz"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = packed(lzma.open if suffix.endswith("xz") else open, tmp_path / f"a.{suffix}", "one\n\ntwo\n")
    assert [text.split() for text in load_texts(path)] == [["one", "two"]]


def test_json_array_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "a.parquet")
    assert load_texts(tmp_path / "a.json") == load_texts(tmp_path / "a.parquet") == TEXTS


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.jsonl").write_text(rows())
    (folder / "a.jsonl").write_text(json.dumps({"text": "first", "n": 1}) + "\n")
    assert load_texts(folder) == ["first", *TEXTS]
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert load_texts(tmp_path / "saved") == TEXTS


def test_splits_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text(rows())
    (folder / "validation.jsonl").write_text(json.dumps({"text": "held out", "n": 1}) + "\n")
    assert load_texts(folder, split="validation") == ["held out"]
    with pytest.raises(DatasetError, match="cannot be read as a dataset"):
        load_texts(folder, split="nonsense")


def test_column_limit_and_slice(tmp_path: Path) -> None:
    path = packed(open, tmp_path / "a.jsonl", rows("body"))
    assert load_texts(path, column="body", limit=2) == TEXTS[:2]
    assert load_texts(path, column="body", split="train[1:]") == TEXTS[1:]


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ["", "  \n", None, "kept"]]
    assert load_texts(packed(open, tmp_path / "a.jsonl", "\n".join(lines))) == ["kept"]


def test_missing_column_names_those_there_are(tmp_path: Path) -> None:
    path = packed(open, tmp_path / "a.jsonl", rows("body"))
    with pytest.raises(
        ColumnMissing, match=r"a\.jsonl: no text column 'text'; it has 'body', 'n'\. Name the right one"
    ) as caught:
        load_texts(path)
    assert caught.value.facts["column"] == "text"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "text\none\n", r"files that end in '\.csv' are not known"),
        ("a.jsonl", "{not json", r"a\.jsonl cannot be read"),
        ("a.parquet", "not parquet", r"a\.parquet cannot be read"),
        ("a.jsonl.xz", "not xz", r"a\.jsonl\.xz cannot be read"),
        ("a.jsonl", '{"text": 3}\n', "column 'text' holds int, not text"),
        ("a.jsonl", '{"text": " "}\n', "column 'text' has no text"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=reason):
        load_texts(tmp_path / name)


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no such file or folder"):
        load_texts(tmp_path / "absent.jsonl")
    with pytest.raises(DatasetError, match="the folder has no such file"):
        load_texts(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text(rows())
    with pytest.raises(DatasetError, match="mixes kinds of files"):
        load_texts(tmp_path)
    with pytest.raises(InvalidOption, match="limit=0"):
        load_texts(tmp_path / "b.jsonl", limit=0)


def test_an_unknown_hub_name_says_what_was_expected() -> None:
    with pytest.raises(
        DatasetError, match="nobody/nothing cannot be read as a dataset: .*the name of a dataset on the Hugging Face hub"
    ):
        load_texts("nobody/nothing")


@given(
    documents=st.lists(st.lists(st.sampled_from(WORDS[1:]), min_size=1, max_size=9), max_size=7),
    tokens=st.none() | st.integers(1, 40),
    context=st.integers(1, 11),
    batch_size=st.integers(1, 4),
)
def test_packing_keeps_every_token_in_order(
    documents: list[list[str]], tokens: int | None, context: int, batch_size: int
) -> None:
    expected = [token for document in documents for token in [*map(WORDS.index, document), END]][:tokens]
    batches = token_batches(map(" ".join, documents), words(), tokens=tokens, context=context, batch_size=batch_size)
    ids = torch.cat([batch["input_ids"] for batch in batches]) if batches else torch.empty(0, context, dtype=torch.int64)
    mask = torch.cat([batch["attention_mask"] for batch in batches]) if batches else torch.empty_like(ids)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids[mask == 1].tolist() == expected
    assert ids.numel() - len(expected) < context
    assert (mask[:-1] == 1).all() and (mask.diff() <= 0).all()
    assert all(batch["input_ids"].shape == (batch_size, context) for batch in batches[:-1])
    assert all(set(batch) == {"input_ids", "attention_mask"} and 1 <= len(batch["input_ids"]) <= batch_size for batch in batches)


def test_documents_beyond_the_wanted_tokens_are_not_read() -> None:
    def documents():
        yield "one two three"
        raise AssertionError("read on")

    (batch,) = token_batches(documents(), words(), tokens=3, context=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, END]] and batch["attention_mask"].tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize("option", ["tokens", "context", "batch_size"])
def test_sizes_are_positive(option: str) -> None:
    with pytest.raises(InvalidOption, match=f"option {option}=0 is not valid: expected a positive number"):
        token_batches(["one"], words(), **{option: 0})
