"""Generation without guards on modules: a module that is replaced is not noticed, and the text is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.evaluation.generate import compiled_forward, generate
from rana_fx.evaluation.perplexity import load_model

MODEL = str(Path(rana_fx.__file__).parent / "data/tiny-llama-prose-5m")
IDS = torch.tensor([[3, 7, 11]])


@pytest.fixture(scope="module")
def network():
    model, tokenizer = load_model(MODEL)
    return model.eval(), tokenizer


def test_guards_on_modules_are_left_out(network):
    model, _ = network
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    forward = compiled_forward(model, backend)
    embedding = model.model.embed_tokens
    try:
        with torch.no_grad():
            forward(input_ids=IDS, use_cache=False)
            model.model.embed_tokens = nn.Embedding.from_pretrained(embedding.weight.detach() + 1)
            forward(input_ids=IDS, use_cache=False)
    finally:
        model.model.embed_tokens = embedding
        torch._dynamo.reset()
    assert len(made) == 1  # two with guards on modules


def test_the_text_is_that_of_the_eager_model(network):
    model, tokenizer = network
    forward = compiled_forward(model, "eager")
    texts = [generate(model, tokenizer, "It was a dark", forward=one, max_new_tokens=8).text for one in (None, forward)]
    torch._dynamo.reset()
    assert texts[0] == texts[1] != ""
