"""``with rana_fx.disabled():`` a compiled model runs dense inside, adapted outside, and neither is compiled twice."""

from __future__ import annotations

import pytest
import torch

import rana_fx
from rana_fx.errors import WeightsFreed
from tests.support.architectures import output
from tests.support.trained import adapted


def test_dense_inside_and_adapted_outside(graphs_as_rewritten):
    model, batch = adapted()
    fast = torch.compile(model, backend=rana_fx.backend, options={"strict": True})
    with torch.no_grad():
        dense, first = output(model(**batch)), output(fast(**batch))
        assert not torch.equal(first, dense)
        with rana_fx.disabled():
            assert torch.equal(output(fast(**batch)), dense)
        compiled = len(graphs_as_rewritten)
        assert torch.equal(output(fast(**batch)), first)
        with rana_fx.disabled():
            assert torch.equal(output(fast(**batch)), dense)
    assert len(graphs_as_rewritten) == compiled


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_an_error_inside_ends_the_block():
    model, batch = adapted()
    fast = torch.compile(model, backend=rana_fx.backend)
    with torch.no_grad():
        first = output(fast(**batch))
        with pytest.raises(ZeroDivisionError), rana_fx.disabled():
            raise ZeroDivisionError
        assert torch.equal(output(fast(**batch)), first)


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_model_without_its_weights_is_no_dense_model():
    model, batch = adapted()
    fast = torch.compile(model, backend=rana_fx.backend, options={"prefill": "factors"})
    with torch.no_grad():
        fast(**batch)
        with rana_fx.disabled(), pytest.raises(Exception, match="run it dense") as caught:
            fast(**batch)
    inner = getattr(caught.value, "inner_exception", caught.value)
    planned = {site for adapter in rana_fx.runtime.attachment.attached(model).plan.adapters for site in adapter.sites}
    assert isinstance(inner, WeightsFreed) and inner.facts["site"] in planned
