"""Under autocast an adapter's matmuls run in the dtype that the replaced linears would have."""

from __future__ import annotations

import pytest
import torch

from rana_fx.kernels.ops import masked_gemv
from rana_fx.passes.runner import run
from tests.support.trained import adapted


@pytest.mark.parametrize("recipe", ["static", "teal"])
def test_products_are_in_the_dtype_of_autocast(recipe):
    model, batch = adapted(recipe, depth=1)
    seen = []

    def look(gm, example_inputs):
        run(gm, example_inputs)
        seen.extend(node.meta["example_value"].dtype for node in gm.graph.nodes if node.target is masked_gemv)
        return gm.forward

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend=look)(**batch)
    assert len(seen) >= 4 and set(seen) == {torch.bfloat16}
