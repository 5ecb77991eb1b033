"""Generation with a quantised cache of keys and values (transformers, by optimum-quanto).

The package is in no extra: at its first use it compiles a C++ extension for a minute. With it installed the test runs.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import rana_fx
from rana_fx._backend import rewritten

CACHE = {"backend": "quanto", "nbits": 4, "q_group_size": 32, "residual_length": 2, "axis_key": 0, "axis_value": 0}
PROMPT = torch.tensor([[5, 9, 33, 60, 12, 71]])


@pytest.mark.filterwarnings("ignore")  # of optimum-quanto, at its import and at its first product
def test_generate():
    pytest.importorskip("optimum.quanto")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=1, initializer_range=0.3
    )
    model = hf.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(3, 93, (4, 32))} for _ in range(4)]
    rana_fx.adapt(model, batches, budget=0.5, recipe="paper", progress=False)

    def text(model):
        say = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return model.generate(PROMPT, **say, cache_implementation="quantized", cache_config=CACHE)

    # sizes that vary are refused by the cache's tensors, under any backend
    got, dense = text(torch.compile(model, backend=rewritten, dynamic=False)), text(model)
    model.compile(backend=rewritten, dynamic=False)
    assert torch.equal(got, text(model)) and not torch.equal(got, dense)
