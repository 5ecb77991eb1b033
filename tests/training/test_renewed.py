"""Code compiled before LoRA was added recompiles, also where no other guard of the model changes."""

from __future__ import annotations

import torch

from rana_fx.runtime.attachment import attached
from rana_fx.training import add_lora, lora_config
from tests.support.trained import adapted, compiled, relative


def test_lora_on_a_frozen_model_recompiles():
    model, batch = adapted("static", depth=1)
    model.eval().requires_grad_(False)
    forward = compiled(model)
    with torch.no_grad():
        before = forward(**batch).logits
        add_lora(model, lora_config(rank=2, dropout=0.0))
        for addition in attached(model).factors.lowrank.additions():
            addition.b.normal_()
        assert relative(forward(**batch).logits, before) > 1e-2
