"""``save_pretrained`` of a model with a plan attached warns that its files load as the dense model, and says what to do."""

from __future__ import annotations

import warnings

import pytest
import torch

import rana_fx
from tests.support.architectures import output
from tests.support.trained import adapted


def said(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in seen if issubclass(warning.category, rana_fx.RanaWarning)]


def test_it_warns_once_and_its_remedy_works(tmp_path):
    model, batch = adapted(name="llama")
    (text,) = said(lambda: model.save_pretrained(tmp_path / "model"))
    assert "LlamaForCausalLM" in text and "as the dense model" in text
    assert "plan.save(folder)" in text and "rana_fx.attach(model, folder)" in text
    assert said(lambda: model.save_pretrained(tmp_path / "again")) == []
    plan = rana_fx.detach(model)
    plan.save(tmp_path / "plan")
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    rana_fx.attach(loaded, tmp_path / "plan")
    with torch.no_grad():
        assert torch.equal(output(loaded(**batch)), output(model(**batch)))


@pytest.mark.parametrize("kind", ["detached", "checkpoint", "not of transformers"])
def test_what_loads_as_it_was_saved_is_silent(tmp_path, kind):
    model, _ = adapted(name="plain_llama" if kind == "not of transformers" else "llama")
    if kind == "detached":
        rana_fx.detach(model)
        assert said(lambda: model.save_pretrained(tmp_path)) == []
    elif kind == "checkpoint":
        assert said(lambda: torch.save(model.state_dict(), tmp_path / "state.pt")) == []
    else:
        assert said(lambda: save_pretrained(model)) == []


def save_pretrained(self):
    """A function of that name which is no method of transformers."""
    return self.state_dict()
