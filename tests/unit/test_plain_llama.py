"""The plain Llama that most tests use is Hugging Face's: the same names of weights and the same logits."""

from __future__ import annotations

import pytest
import torch

from tests.support.architectures import build, output
from tests.support.plain_llama import plain_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_the_weights_and_logits_of_hugging_faces(dtype):
    (model, batch), (plain, _) = build("llama", 2), build("plain_llama", 2)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in model.named_parameters()]
    plain.load_state_dict(model.state_dict())
    model, plain = model.to(dtype), plain.to(dtype)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4], mask[1, 9:] = 0, 0
    with torch.no_grad():
        assert torch.equal(output(plain_of(model)(**batch)), output(plain(**batch)))
        torch.testing.assert_close(output(plain(**batch)), output(model(**batch)))
        got, expected = (output(one(**batch, attention_mask=mask)) for one in (plain, model))
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])
