"""Text that bench.reproduce trains on: packed as by token_batches, repeated only after a whole epoch; some held out."""

from __future__ import annotations

import json

import pytest
import torch

from bench.quality.training_text import training_text
from rana_fx.errors import TooLittleText
from rana_fx.evaluation.perplexity import load_model
from rana_fx.evaluation.text import load_texts, token_batches
from tests.support.tiny_model import saved_tiny

CONTEXT, SIZE = 16, 4


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(a file of documents, a tokenizer)."""
    folder = tmp_path_factory.mktemp("text")
    model, text = saved_tiny(folder, layers=1)
    words = load_texts(text)[0].split()
    documents = [" ".join(words[i : i + 40]) for i in range(0, 1200, 40)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return str(folder / "text.jsonl"), load_model(str(model), device="cpu")[1]


def rows(batches):
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def made(given, tokens, *, held_out=CONTEXT * SIZE, seed=0):
    source, tokenizer = given
    return training_text(source, tokenizer, tokens=tokens, held_out=held_out, context=CONTEXT, batch_size=SIZE, seed=seed)


def test_sequences_are_those_of_token_batches_of_the_documents_in_some_order(given):
    source, tokenizer = given
    found = made(given, 10 * CONTEXT * SIZE)
    # documents have the same special tokens: the same ids for each document, in any order
    end = tokenizer.eos_token_id
    ids = [i for row in rows(token_batches(load_texts(source), tokenizer, context=CONTEXT, batch_size=SIZE)) for i in row]
    trained = [i for row in sorted(rows(found.batches)) for i in row]
    assert set(trained) <= set(ids) and end in trained
    packed = found.batches.ids_ST.flatten().tolist() + [i for row in rows(found.held_out) for i in row]
    documents = "".join(map(chr, packed)).split(chr(end))[1:-1]
    known = "".join(map(chr, ids)).split(chr(end))
    assert len(documents) > 20 and set(documents) <= set(known)


def test_a_short_text_is_repeated_in_another_order(given):
    once = made(given, 10 * CONTEXT * SIZE)
    sequences = len(once.batches.ids_ST)
    found = made(given, (2 * sequences + sequences // 2) // SIZE * CONTEXT * SIZE)
    assert found.passes == pytest.approx(2.5, abs=SIZE / sequences)
    order = found.batches.order.tolist()
    assert sorted(order[:sequences]) == sorted(order[sequences : 2 * sequences]) == list(range(sequences))
    assert order[:sequences] != order[sequences : 2 * sequences]
    assert not set(rows(found.batches)) & set(rows(found.held_out))
    assert len(found.batches) == len(found.batches.order) // SIZE and len(found.held_out) == 1


def test_the_seed_decides(given):
    first, second, other = (made(given, 5 * CONTEXT * SIZE, seed=seed) for seed in (1, 1, 2))
    assert rows(first.batches) == rows(second.batches) != rows(other.batches)
    assert rows(first.held_out) == rows(second.held_out) != rows(other.held_out)


def test_slices_are_lists_of_batches(given):
    batches = made(given, 8 * CONTEXT * SIZE).batches
    assert len(batches) == 8
    assert [batch["input_ids"].shape for batch in batches[:3]] == [(SIZE, CONTEXT)] * 3
    for step in range(8):
        (batch,) = batches[step : step + 1]
        assert torch.equal(batch["input_ids"], batches[step]["input_ids"]) and batch["input_ids"].dtype == torch.int64


def test_too_little_text_is_an_error(given):
    with pytest.raises(TooLittleText, match="held out"):
        made(given, 4 * CONTEXT * SIZE, held_out=10**6)
    with pytest.raises(TooLittleText):
        made(given, CONTEXT)
